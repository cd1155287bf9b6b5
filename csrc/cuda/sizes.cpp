// Sizes that no family can count.
#include <algorithm>
#include <limits>
#include <string>

#include "ceil_div.h"
#include "cuda/common/kept.h"
#include "cuda/launch.h"
#include "cuda/portable/work_table.h"
#include "schedule.h"

namespace mixed_attention::cuda {
namespace {

// A segment's tiles and blocks by these: at most so many fit anywhere.
constexpr int64_t kLeastTileRows = 32, kLeastBlockRows = 16;

std::string more_than(const char* what, int64_t number, int64_t most) {
  return std::string(what) + ": " + std::to_string(number) + " is not supported, expected at most " +
         std::to_string(most);
}

// What a schedule comes to in the smallest tiles and blocks.
struct Sizes {
  int64_t num_tiles;
  int64_t longest;  // blocks that a tile walks through
};

Sizes sizes_by_query(const Schedule& schedule) {
  Sizes sizes{};
  for (const QuerySegment& segment : schedule.query_segments) {
    sizes.num_tiles += ceil_div(segment.rows.size(), kLeastTileRows);
    int64_t num_blocks = 0;
    for (const Range& keys : segment.keys) num_blocks += ceil_div(keys.size(), kLeastBlockRows);
    sizes.longest = std::max(sizes.longest, num_blocks);
  }
  return sizes;
}

// The larger ones of either side.
Sizes sizes_by_either(const Schedule& schedule) {
  Sizes sizes = sizes_by_query(schedule);
  int64_t key_tiles = 0;
  for (const KeySegment& segment : schedule.key_segments) {
    key_tiles += ceil_div(segment.rows.size(), kLeastTileRows);
    int64_t num_blocks = 0;
    for (const Reader& reader : segment.readers) num_blocks += ceil_div(reader.queries.size(), kLeastBlockRows);
    sizes.longest = std::max(sizes.longest, num_blocks);
  }
  sizes.num_tiles = std::max(sizes.num_tiles, key_tiles);
  return sizes;
}

std::string refusal(const AttentionParams& params, Sizes (*sizes_of)(const Schedule&), Kept<uint64_t, Sizes>& kept) {
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  if (params.seqlen_q > kMaxRows) return more_than("rows of q", params.seqlen_q, kMaxRows);
  if (params.seqlen_k > kMaxRows) return more_than("rows of k", params.seqlen_k, kMaxRows);
  const auto sizes = kept.of(params.schedule->id, [&] { return sizes_of(*params.schedule); });
  if (sizes->longest > kMaxInt) {
    return more_than("blocks of rows that one tile attends to, or is read by", sizes->longest, kMaxInt);
  }
  const int64_t tiles = params.batch_size * params.num_heads * sizes->num_tiles;
  return tiles > kMaxInt ? more_than("tiles of rows of all heads and sequences", tiles, kMaxInt) : "";
}

}  // namespace

// NOTE: what is kept is never freed, as threads may outlive static objects.

std::string refusal_of_sizes(const FwdParams& params) {
  static auto* kept = new Kept<uint64_t, Sizes>(256);
  return refusal(params, sizes_by_query, *kept);
}

std::string refusal_of_sizes(const BwdParams& params) {
  static auto* kept = new Kept<uint64_t, Sizes>(256);
  return refusal(params, sizes_by_either, *kept);
}

}  // namespace mixed_attention::cuda
