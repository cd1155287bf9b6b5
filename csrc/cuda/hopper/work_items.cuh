// Walks a work table: the items of a block, and the tiles that an item goes through.
#pragma once

#include "cuda/hopper/work_table.h"

namespace mixed_attention::cuda::hopper {

// The items of this block, tiles of kTileRows rows: for (WorkItems<kTileRows> item(table); item.next();) ...
// kSharers blocks in a row have the same items.
template <int kTileRows, typename Table = WorkTable, int kSharers = 1>
struct WorkItems {
  const Table& table;
  int round = 0;
  int segment = 0;    // of the current item, like all that follows
  int row_begin = 0;  // of the tile; its rows end with the tile or with the segment
  int head = 0, batch = 0;

  __device__ explicit WorkItems(const Table& table) : table(table) {}

  __device__ const auto& tiles() const { return table.segments[segment]; }

  __device__ bool next() {
    // Every other round runs backwards, so that no block gets the longest item of each.
    const int num_blocks = gridDim.x / kSharers;
    const int block = blockIdx.x / kSharers;
    const int item = round * num_blocks + (round % 2 == 0 ? block : num_blocks - 1 - block);
    if (item >= table.num_items) return false;
    ++round;
    // A block's items stand in ascending order: the search goes on where it ended.
    while (item >= tiles().item_end) ++segment;
    locate(item - (segment == 0 ? 0 : table.segments[segment - 1].item_end));
    return true;
  }

 private:
  // Neighbouring items share a head, and thus keys and values in the L2 cache.
  __device__ void locate(int item_of_segment) {
    const int num_tiles = (tiles().row_end - tiles().row_begin + kTileRows - 1) / kTileRows;
    const int sequence = item_of_segment / num_tiles;
    row_begin = tiles().row_begin + item_of_segment % num_tiles * kTileRows;
    batch = sequence / table.num_heads;
    head = sequence % table.num_heads;
  }
};

struct KeyTile {
  int row_begin, num_rows;
};

// The key tiles of a segment in order: the partial ones, then the full ones range by range.
template <int kBlockN>
struct KeyTileIterator {
  const KeyTiles* ranges;
  int num_partial;
  int range = 0, tile = 0;

  __device__ KeyTileIterator(const WorkTable& table, const QueryTiles& segment)
      : ranges(table.ranges + segment.first_range), num_partial(segment.num_partial) {}

  __device__ KeyTile next() {
    if (num_partial > 0) {
      const KeyTiles& partial = ranges[range];
      const KeyTile result{partial.begin + partial.num_full * kBlockN, partial.tail};
      if (++range == num_partial) num_partial = range = 0;
      return result;
    }
    while (tile == ranges[range].num_full) {
      ++range;
      tile = 0;
    }
    return {ranges[range].begin + tile++ * kBlockN, kBlockN};
  }
};

}  // namespace mixed_attention::cuda::hopper
