// Tiles of queries: one of all, and those that read a key segment, run by run.
#pragma once

#include "cuda/hopper/bwd_config.h"
#include "cuda/hopper/key_work_table.h"

namespace mixed_attention::cuda::hopper {

struct QueryTile {
  int row_begin, num_rows;
  int index;  // among the tiles of all segments, by which the statistics lie
};

// The tile of this index; runs: all of them, in order.
__device__ inline QueryTile query_tile(const QueryRun* runs, int num_runs, int index) {
  int run = 0;
  while (run + 1 < num_runs && runs[run + 1].first_tile <= index) ++run;
  const int row_begin = runs[run].row_begin + (index - runs[run].first_tile) * kQueryTileRows;
  return {row_begin, min(kQueryTileRows, runs[run].row_end - row_begin), index};
}

struct QueryTileIterator {
  const QueryRun* run;
  int tile = 0;

  __device__ QueryTileIterator(const KeyWorkTable& table, const KeySegmentTiles& segment)
      : run(table.ranges + segment.first_range) {}

  __device__ QueryTile next() {
    const int row_begin = run->row_begin + tile * kQueryTileRows;
    const QueryTile result{row_begin, min(kQueryTileRows, run->row_end - row_begin), run->first_tile + tile};
    ++tile;
    if (row_begin + kQueryTileRows >= run->row_end) {
      ++run;
      tile = 0;
    }
    return result;
  }
};

}  // namespace mixed_attention::cuda::hopper
