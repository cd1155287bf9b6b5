// The work items of the kernel for dk and dv: key tiles, longest first, and the query tiles that read them.
//
// The table is small and travels in the kernel's parameters, as the forward's does. Device side: work_items.cuh,
// query_tiles.cuh.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace mixed_attention::cuda::hopper {

// Query rows of a segment, as tiles of kQueryTileRows rows. Their statistics lie tile by tile, the last tile filled up,
// so that TMA finds every tile aligned: first_tile counts the tiles of the segments before.
struct QueryRun {
  int row_begin, row_end;
  int first_tile;
};

// A key segment as tiles of kBlockN rows, the last one ragged. Its items are these tiles for every head and batch.
struct KeySegmentTiles {
  int row_begin, row_end;
  int first_range;  // in KeyWorkTable::ranges, those who read it
  int num_tiles;    // query tiles; without any the gradients are zero
  int first_tile;   // those of the segments with lower rows come before
  int item_end;     // items of this segment and of all before it
};

struct KeyWorkTable {
  static constexpr int kMaxSegments = 64;
  static constexpr int kMaxRanges = 128;

  int num_items, num_heads;
  KeySegmentTiles segments[kMaxSegments];  // most query tiles first
  QueryRun ranges[kMaxRanges];
};

// The query segments, in their order.
std::vector<QueryRun> make_query_runs(const Schedule& schedule);

int num_query_tiles(const QueryRun& run);

// How many tiles all runs have together.
int num_query_tiles(const std::vector<QueryRun>& runs);

// Who reads the key segments, one after the other: the query tiles of KeySegmentTiles::first_tile.
std::vector<QueryRun> make_reader_runs(const Schedule& schedule, const std::vector<QueryRun>& runs);

// How many tiles they have together.
int64_t num_reader_tiles(const Schedule& schedule);

// True if the query tiles of a key segment, and the items of a launch, are counted in 32 bits.
bool are_keys_counted_in_32_bits(const AttentionParams& params);

// True if the schedule of a call fits a table.
bool fits_key_work_table(const AttentionParams& params);

KeyWorkTable make_key_work_table(const AttentionParams& params, const std::vector<QueryRun>& runs, int block_n);

// About how long a launch takes, in steps of a query tile: in each round of num_blocks items all wait for the longest.
// is_ordered: additions to dq follow one another.
int64_t steps_of_longest_block(const KeyWorkTable& table, int block_n, int num_blocks, int splits, bool is_ordered);

}  // namespace mixed_attention::cuda::hopper
