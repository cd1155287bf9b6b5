// Sizes that no family can count.
#include <algorithm>
#include <limits>
#include <string>

#include "ceil_div.h"
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

}  // namespace

std::string refusal_of_sizes(const AttentionParams& params) {
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  if (params.seqlen_q > kMaxRows) return more_than("rows of q", params.seqlen_q, kMaxRows);
  if (params.seqlen_k > kMaxRows) return more_than("rows of k", params.seqlen_k, kMaxRows);
  int64_t query_tiles = 0, key_tiles = 0, longest = 0;
  for (const QuerySegment& segment : params.schedule->query_segments) {
    query_tiles += ceil_div(segment.rows.size(), kLeastTileRows);
    int64_t num_blocks = 0;
    for (const Range& keys : segment.keys) num_blocks += ceil_div(keys.size(), kLeastBlockRows);
    longest = std::max(longest, num_blocks);
  }
  for (const KeySegment& segment : params.schedule->key_segments) {
    key_tiles += ceil_div(segment.rows.size(), kLeastTileRows);
    int64_t num_blocks = 0;
    for (const Reader& reader : segment.readers) num_blocks += ceil_div(reader.queries.size(), kLeastBlockRows);
    longest = std::max(longest, num_blocks);
  }
  if (longest > kMaxInt) return more_than("blocks of rows that one tile attends to, or is read by", longest, kMaxInt);
  const int64_t tiles = params.batch_size * params.num_heads * std::max(query_tiles, key_tiles);
  return tiles > kMaxInt ? more_than("tiles of rows of all heads and sequences", tiles, kMaxInt) : "";
}

}  // namespace mixed_attention::cuda
