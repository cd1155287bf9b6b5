// Tiles of queries: one of all, and those that read a key segment, run by run.
#pragma once

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/plan/key_list.h"
#include "cuda/hopper/plan/key_table.h"

namespace mixed_attention::cuda::hopper {

struct QueryTile {
  int row_begin, num_rows;
  int index;  // among the tiles of all segments, by which the statistics lie
};

// The run of the tile of this index; runs: all of them, in order.
__device__ inline int run_of_tile(const QueryRun* runs, int num_runs, int index) {
  int run = 0;
  while (run + 1 < num_runs && runs[run + 1].first_tile <= index) ++run;
  return run;
}

// The tile of this index; run: its.
__device__ inline QueryTile query_tile(const QueryRun* runs, int run, int index) {
  const int row_begin = runs[run].row_begin + (index - runs[run].first_tile) * kQueryTileRows;
  return {row_begin, min(kQueryTileRows, runs[run].row_end - row_begin), index};
}

// A tile of queries and the segment that it belongs to.
struct TileOfSegment {
  int segment;
  QueryTile queries;
};

// That of this index, where the runs of all queries are in the parameters of the kernel, or in a list.
template <typename Params>
__device__ inline TileOfSegment find_tile(const Params& params, int index) {
  const int run = run_of_tile(params.runs, params.num_runs, index);
  return {run, query_tile(params.runs, run, index)};
}
__device__ inline TileOfSegment find_tile(const ListedQueries* queries, int index) {
  const ListedQueries tile = queries[index];
  return {tile.segment, {tile.row_begin, min(kQueryTileRows, tile.row_end - tile.row_begin), index}};
}

struct QueryTileIterator {
  const KeyWorkTable& table;
  int run;   // in table.ranges
  int tile;  // of the run

  // Starts at the tile of this index among the segment's.
  __device__ QueryTileIterator(const KeyWorkTable& table, const KeySegmentTiles& segment, int first) : table(table) {
    seek(segment, first);
  }

  __device__ void seek(const KeySegmentTiles& segment, int first) {
    run = segment.first_range;
    tile = first;
    for (; tile >= num_tiles(); ++run) tile -= num_tiles();
  }

  __device__ QueryTile next() {
    const QueryRun& rows = table.ranges[run];
    const int row_begin = rows.row_begin + tile * kQueryTileRows;
    const QueryTile result{row_begin, min(kQueryTileRows, rows.row_end - row_begin), rows.first_tile + tile};
    ++tile;
    if (row_begin + kQueryTileRows >= rows.row_end) {
      ++run;
      tile = 0;
    }
    return result;
  }

 private:
  __device__ int num_tiles() const {
    const QueryRun& rows = table.ranges[run];
    return (rows.row_end - rows.row_begin + kQueryTileRows - 1) / kQueryTileRows;
  }
};

}  // namespace mixed_attention::cuda::hopper
