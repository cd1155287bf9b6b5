#include "cuda/hopper/plan/key_tiles.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace mixed_attention::cuda::hopper {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

// Tiles of the smallest kBlockM bound the number of items from above.
constexpr int64_t kLeastBlockM = 64;

}  // namespace

SegmentKeyTiles make_key_tiles(const QuerySegment& segment, int block_n, KeyTiles* ranges) {
  KeyTiles* end = ranges;
  for (const Range& keys : segment.keys) {
    if (keys.size() == 0) continue;
    *end++ = {static_cast<int>(keys.begin), static_cast<int>(keys.size() / block_n),
              static_cast<int>(keys.size() % block_n)};
  }
  const auto first_even = std::stable_partition(ranges, end, [](const KeyTiles& tiles) { return tiles.tail > 0; });
  const int num_partial = static_cast<int>(first_even - ranges);
  const int num_tiles =
      std::accumulate(ranges, end, num_partial, [](int sum, const KeyTiles& tiles) { return sum + tiles.num_full; });
  return {static_cast<int>(end - ranges), num_partial, num_tiles};
}

bool are_counted_in_32_bits(const AttentionParams& params) {
  int64_t num_items = 0;
  for (const QuerySegment& segment : params.schedule->query_segments) {
    num_items += (segment.rows.size() / kLeastBlockM + 1) * params.num_heads * params.batch_size;
    int64_t num_keys = 0;
    for (const Range& keys : segment.keys) num_keys += keys.size();
    if (num_keys >= kMaxInt) return false;
  }
  return num_items < kMaxInt / 2;
}

}  // namespace mixed_attention::cuda::hopper
