#include "cuda/hopper/plan/tile_list.h"

#include <algorithm>

#include "cuda/common/scratch.h"
#include "cuda/common/table_id.h"
#include "cuda/hopper/plan/key_tiles.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {

int64_t HostTileList::tile_bytes() const { return static_cast<int64_t>(part_bytes(tiles.size() * sizeof(ListedTile))); }

int64_t HostTileList::device_bytes() const {
  return tile_bytes() + static_cast<int64_t>(part_bytes(ranges.size() * sizeof(KeyTiles)));
}

WorkTable HostTileList::table(const AttentionParams& params) const {
  WorkTable table{};
  table.num_heads = static_cast<int>(params.num_heads);
  table.list.num_batch_heads = static_cast<int>(params.batch_size * params.num_heads);
  table.num_items = static_cast<int>(tiles.size()) * table.list.num_batch_heads;
  return table;
}

HostTileList make_tile_list(const AttentionParams& params, int block_m, int block_n) {
  HostTileList list{.tiles = {}, .ranges = {}, .id = new_table_id()};
  for (const QuerySegment& segment : params.schedule->query_segments) {
    const int first_range = static_cast<int>(list.ranges.size());
    list.ranges.resize(list.ranges.size() + segment.keys.size());
    const SegmentKeyTiles keys = make_key_tiles(segment, block_n, list.ranges.data() + first_range);
    list.ranges.resize(first_range + keys.num_ranges);
    const int row_end = static_cast<int>(segment.rows.end);
    for (int row = static_cast<int>(segment.rows.begin); row < row_end; row += block_m) {
      list.tiles.push_back({row, row_end, first_range, keys.num_partial, keys.num_tiles});
    }
  }
  std::stable_sort(list.tiles.begin(), list.tiles.end(),
                   [](const ListedTile& a, const ListedTile& b) { return a.num_tiles > b.num_tiles; });
  return list;
}

}  // namespace mixed_attention::cuda::hopper
