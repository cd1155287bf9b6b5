// Walks a work table: the items of a block, and the tiles that an item goes through.
#pragma once

#include "cuda/hopper/plan/query_table.h"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/warp_copy.cuh"

namespace mixed_attention::cuda::hopper {

// The rows that an item owns, of one head and batch_head; they end with the tile or with the segment.
struct ItemRows {
  int row_begin, row_end;
  int head, batch;
};

// The number of the item, or of the one that it is a split of. The backward knows no splits.
template <typename Table>
__device__ inline int number_of_item(const Table&, int item) {
  return item;
}
__device__ inline int number_of_item(const WorkTable& table, int item) { return table.splits.number(item); }

// The rows of the item of this number; segment: which it belongs to.
template <int kTileRows, typename Table>
__device__ inline ItemRows rows_of_item(const Table& table, int number, int segment) {
  const auto& tiles = table.segments[segment];
  const int number_in_segment = number - (segment == 0 ? 0 : table.segments[segment - 1].item_end);
  const int num_tiles = (tiles.row_end - tiles.row_begin + kTileRows - 1) / kTileRows;
  // Neighbouring items share a head, and thus keys and values in the L2 cache.
  const int batch_head = number_in_segment / num_tiles;
  return {tiles.row_begin + number_in_segment % num_tiles * kTileRows, tiles.row_end, batch_head % table.num_heads,
          batch_head / table.num_heads};
}

// The key tiles of an item from begin to end, at least one. The first num_partial of all are partial ones.
struct TileShare {
  int begin, end, num_partial;
};

// The items of this block, by number. kSharers blocks in a row have the same items.
template <int kTileRows, typename Table = WorkTable, int kSharers = 1>
struct ItemWalk {
  const Table& table;
  int round = 0;
  int item = 0;     // the current one
  int segment = 0;  // which it belongs to

  __device__ explicit ItemWalk(const Table& table) : table(table) {}

  __device__ bool next() {
    // Every other round runs backwards, so that no block gets the longest item of each.
    const int num_blocks = gridDim.x / kSharers;
    const int block = blockIdx.x / kSharers;
    item = round * num_blocks + (round % 2 == 0 ? block : num_blocks - 1 - block);
    if (item >= table.num_items) return false;
    ++round;
    // A block's items stand in ascending order: the search goes on where it ended.
    while (number_of_item(table, item) >= tiles().item_end) ++segment;
    return true;
  }

  // Items without keys come last.
  __device__ bool next_with_keys() { return next() && tiles().num_tiles > 0; }

  __device__ const auto& tiles() const { return table.segments[segment]; }

  __device__ ItemRows rows() const { return rows_of_item<kTileRows>(table, number_of_item(table, item), segment); }

  __device__ const KeyTiles* ranges() const { return table.ranges + tiles().first_range; }

  // The key tiles that a split, or a whole item, goes through.
  __device__ TileShare share() const {
    const int num_tiles = tiles().num_tiles;
    const ItemSplits& splits = table.splits;
    if (!splits.has(item)) return {0, num_tiles, tiles().num_partial};
    const int split = splits.split(item);
    return {num_tiles * split / splits.num_splits, num_tiles * (split + 1) / splits.num_splits, tiles().num_partial};
  }
};

// The items of this block in a list, or of one of its kTeams teams.
template <int kTileRows, int kTeams = 1>
struct ListItem {
  const WorkTable& table;
  int item;  // the current one
  ListedTile tile{};

  __device__ const ListedTile& tiles() const { return tile; }

  __device__ const KeyTiles* ranges() const { return table.list.ranges + static_cast<uint32_t>(tile.first_range); }

  __device__ ItemRows rows() const {
    const int batch_head = item % table.list.num_batch_heads;
    return {tile.row_begin, tile.row_end, batch_head % table.num_heads, batch_head / table.num_heads};
  }

  __device__ TileShare share() const { return {0, tile.num_tiles, tile.num_partial}; }

  __device__ const ListedTile* find(int number) const { return table.list.tiles + number / table.list.num_batch_heads; }

  __device__ ListedTile read(int number) const { return *find(number); }

  // What is left for the last round goes to the first teams of all blocks before any block's second one gets some.
  __device__ static int first_item(int team) {
    return static_cast<int>(blockIdx.x) + team * static_cast<int>(gridDim.x);
  }

  // Tiles of the same length need no turns to be fair to blocks, and others stand in falling order.
  __device__ static int step() { return static_cast<int>(gridDim.x) * kTeams; }
};

// Their walk. The tile of the next item is read ahead, as an access takes some hundred cycles.
template <int kTileRows, int kTeams = 1>
struct ListWalk : ListItem<kTileRows, kTeams> {
  using Item = ListItem<kTileRows, kTeams>;

  int next_item;
  ListedTile next_tile{};

  __device__ explicit ListWalk(const WorkTable& table, int team = 0)
      : Item{table, 0}, next_item(Item::first_item(team)) {
    read_ahead();
  }

  __device__ bool next() {
    this->item = next_item;
    if (next_item >= this->table.num_items) return false;
    this->tile = next_tile;
    next_item += Item::step();
    read_ahead();
    return true;
  }

  __device__ bool next_with_keys() { return next() && this->tile.num_tiles > 0; }

 private:
  __device__ void read_ahead() {
    if (next_item < this->table.num_items) next_tile = this->read(next_item);
  }
};

// The same for whole warps, which wait for no tile before they are at it.
template <int kTileRows, int kTeams = 1>
struct WarpListWalk : ListItem<kTileRows, kTeams> {
  using Item = ListItem<kTileRows, kTeams>;

  int next_item;
  ptx::WarpCopy<ListedTile, 5> next_tile;

  __device__ explicit WarpListWalk(const WorkTable& table, int team = 0)
      : Item{table, 0}, next_item(Item::first_item(team)) {
    read_ahead();
  }

  __device__ bool next() {
    this->item = next_item;
    if (next_item >= this->table.num_items) return false;
    this->tile = next_tile.get();
    next_item += Item::step();
    read_ahead();
    return true;
  }

  __device__ bool next_with_keys() { return next() && this->tile.num_tiles > 0; }

 private:
  __device__ void read_ahead() {
    if (next_item < this->table.num_items) next_tile.read(this->find(next_item));
  }
};

// The same for who has few registers, and is ahead of all others anyway.
template <int kTileRows, int kTeams = 1>
struct LeanListWalk : ListItem<kTileRows, kTeams> {
  using Item = ListItem<kTileRows, kTeams>;

  __device__ explicit LeanListWalk(const WorkTable& table, int team = 0)
      : Item{table, Item::first_item(team) - Item::step()} {}

  __device__ bool next_with_keys() {
    this->item += ptx::num_blocks_anew() * kTeams;
    if (this->item >= this->table.num_items) return false;
    this->tile = this->read(this->item);
    return this->tile.num_tiles > 0;
  }
};

// A walk with the rows of each item at hand: for (WorkItems<kTileRows> item(table); item.next();) ...
template <typename Walk>
struct ItemsOf : Walk {
  int row_begin = 0;
  int head = 0, batch = 0;

  using Walk::Walk;

  __device__ bool next() {
    if (!Walk::next()) return false;
    const ItemRows rows = this->rows();
    row_begin = rows.row_begin;
    head = rows.head;
    batch = rows.batch;
    return true;
  }
};

template <int kTileRows, typename Table = WorkTable, int kSharers = 1>
using WorkItems = ItemsOf<ItemWalk<kTileRows, Table, kSharers>>;

struct KeyTile {
  int row_begin, num_rows;
};

// The key tiles of a segment in order: the partial ones, then the full ones range by range.
template <int kBlockN>
struct KeyTileIterator {
  const KeyTiles* ranges;
  int num_partial;
  uint32_t range = 0;
  int tile = 0;

  // Starts at the tile of this index, which the item of a walk has.
  template <typename Walk>
  __device__ explicit KeyTileIterator(const Walk& walk, int first = 0)
      : ranges(walk.ranges()), num_partial(walk.tiles().num_partial) {
    if (first < num_partial) {
      range = first;
    } else {
      tile = first - num_partial;
      num_partial = 0;
      for (; tile >= ranges[range].num_full; ++range) tile -= ranges[range].num_full;
    }
  }

  __device__ KeyTile next() {
    if (num_partial > 0) {
      const KeyTiles& partial = ranges[range];
      const KeyTile result{partial.begin + partial.num_full * kBlockN, partial.tail};
      if (++range == static_cast<uint32_t>(num_partial)) num_partial = range = 0;
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
