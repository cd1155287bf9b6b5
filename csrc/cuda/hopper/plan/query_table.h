// The work items of a launch: query tiles, longest first, and for each the key tiles that it attends to.
//
// The table is small and travels in the kernel's parameters, so that nothing is uploaded; that of many segments is a
// list on the device. Device side: work_items.cuh.
#pragma once

#include "params.h"

namespace mixed_attention::cuda::hopper {

// A key range as tiles of kBlockN rows. The rows that do not fill a tile stand at its end.
struct KeyTiles {
  int begin;     // first row
  int num_full;  // full tiles
  int tail;      // rows of the partial tile, 0 = none
};

// A query segment as tiles of kBlockM rows, or only its full ones, or only the ragged one at its end. Its items are
// these tiles for every head and batch.
struct QueryTiles {
  int row_begin, row_end;
  int first_range;             // in WorkTable::ranges; those with a partial tile come first
  int num_partial, num_tiles;  // key tiles: partial ones, and all
  int num_steps;               // how long an item takes, in steps of a key tile under a full tile of queries
  int item_end;                // items of this segment and of all before it, in the count of whole ones
};

// Some items are split: each split goes through a share of the key tiles. Splits are items, too, and take the place of
// theirs one after the other.
struct ItemSplits {
  int begin = 0;       // the first of those items
  int num_whole = 0;   // how many they were
  int num_splits = 1;  // of each

  constexpr int num_items() const { return num_whole * num_splits; }
  constexpr bool has(int item) const { return begin <= item && item < begin + num_items(); }

  // The number of a split among those of its item, and its place among the splits of all.
  constexpr int split(int item) const { return place(item) % num_splits; }
  constexpr int place(int item) const { return item - begin; }

  // The number of the item, or of the one that it is a split of, counted in whole ones.
  constexpr int number(int item) const {
    if (item < begin) return item;
    return has(item) ? begin + (item - begin) / num_splits : item - num_items() + num_whole;
  }
};

// A tile of rows in the list of many: where it lies, and the key tiles that it goes through.
struct alignas(16) ListedTile {
  int row_begin, row_end;  // with the segment
  int first_range;         // in TileList::ranges
  int num_partial, num_tiles;
};

// The items of a plan of many segments, which lies in device memory: an item is a tile of rows for one batch_head, and
// those of a tile follow one another.
struct TileList {
  const ListedTile* tiles;
  const KeyTiles* ranges;
  int num_batch_heads;
};

struct WorkTable {
  static constexpr int kMaxSegments = 64;
  static constexpr int kMaxRanges = 128;

  int num_items, num_heads;           // splits count each
  ItemSplits splits;                  // none of a list
  TileList list;                      // in place of segments and ranges where a kernel goes through a list
  QueryTiles segments[kMaxSegments];  // longest items first
  KeyTiles ranges[kMaxRanges];
};

// True if the schedule of a call fits a table.
bool fits_work_table(const AttentionParams& params);

WorkTable make_work_table(const AttentionParams& params, int block_m, int block_n);

}  // namespace mixed_attention::cuda::hopper
