#include "cuda/hopper/plan/query_table.h"

#include <algorithm>
#include <vector>

#include "ceil_div.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/plan/key_tiles.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {
namespace {

// Appends the key ranges of one segment.
QueryTiles add_ranges(const QuerySegment& segment, int block_n, WorkTable& table, int& num_ranges) {
  const SegmentKeyTiles keys = make_key_tiles(segment, block_n, table.ranges + num_ranges);
  QueryTiles tiles{};
  tiles.row_begin = static_cast<int>(segment.rows.begin);
  tiles.row_end = static_cast<int>(segment.rows.end);
  tiles.first_range = num_ranges;
  tiles.num_partial = keys.num_partial;
  tiles.num_tiles = tiles.num_steps = keys.num_tiles;
  num_ranges += keys.num_ranges;
  return tiles;
}

}  // namespace

bool fits_work_table(const AttentionParams& params) {
  const std::vector<QuerySegment>& segments = params.schedule->query_segments;
  if (segments.size() > WorkTable::kMaxSegments) return false;
  size_t num_ranges = 0;
  for (const QuerySegment& segment : segments) num_ranges += segment.keys.size();
  return num_ranges <= WorkTable::kMaxRanges && are_counted_in_32_bits(params);
}

WorkTable make_work_table(const AttentionParams& params, int block_m, int block_n) {
  WorkTable table{};
  table.num_heads = static_cast<int>(params.num_heads);
  const std::vector<QuerySegment>& segments = params.schedule->query_segments;
  // The ragged tiles stand apart, as they may be shorter.
  const bool sets_apart = 2 * segments.size() <= WorkTable::kMaxSegments;
  int num_segments = 0, num_ranges = 0;
  for (const QuerySegment& segment : segments) {
    QueryTiles tiles = add_ranges(segment, block_n, table, num_ranges);
    const int num_ragged_rows = (tiles.row_end - tiles.row_begin) % block_m;
    if (sets_apart && num_ragged_rows > 0) {
      QueryTiles ragged = tiles;
      ragged.row_begin = tiles.row_end -= num_ragged_rows;
      if (skips_softmax(block_m) && num_ragged_rows <= block_m - kWarpgroupRows)
        ragged.num_steps = (2 * tiles.num_tiles + 2) / 3;
      table.segments[num_segments++] = ragged;
    }
    if (tiles.row_begin < tiles.row_end) table.segments[num_segments++] = tiles;
  }
  std::stable_sort(table.segments, table.segments + num_segments,
                   [](const QueryTiles& a, const QueryTiles& b) { return a.num_steps > b.num_steps; });
  for (int i = 0; i < num_segments; ++i) {
    QueryTiles& tiles = table.segments[i];
    const int64_t num_blocks = ceil_div(tiles.row_end - tiles.row_begin, block_m);
    table.num_items += static_cast<int>(num_blocks * params.num_heads * params.batch_size);
    tiles.item_end = table.num_items;
  }
  return table;
}

}  // namespace mixed_attention::cuda::hopper
