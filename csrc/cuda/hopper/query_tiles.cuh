// The query tiles that read a key segment, run by run.
#pragma once

#include "cuda/hopper/bwd_config.h"
#include "cuda/hopper/key_work_table.h"

namespace mixed_attention::cuda::hopper {

struct QueryTile {
  int row_begin, num_rows;
  int index;  // among the tiles of all segments, by which the statistics lie
};

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
