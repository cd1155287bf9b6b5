// Walks a list of keys (key_list.h): the items of a launch, the tiles of keys of each, and the query tiles that read
// one.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/listed_shared.h"
#include "cuda/hopper/bwd/query_tiles.cuh"
#include "cuda/hopper/plan/key_list.h"

namespace mixed_attention::cuda::hopper {

// An item of a list: tiles of keys from `begin` to `end`, one after the other, of one batch_head.
struct UnitOfList {
  int begin, end;
  int head, batch;

  __device__ UnitOfList(const KeyList& list, int item) {
    const int unit = item / list.num_batch_heads, batch_head = item % list.num_batch_heads;
    begin = list.units[unit];
    end = list.units[unit + 1];
    head = batch_head % list.num_heads;
    batch = batch_head / list.num_heads;
  }
};

// The query tiles of an item that has any, run by run.
class ListedQueryIterator {
 public:
  __device__ ListedQueryIterator(const ListedRun* runs, int first_run, bool is_first, bool is_last)
      : next_run_(runs + first_run), is_first_(is_first), is_last_(is_last), run_(*next_run_++) {}

  __device__ QueryTile next() {
    if (++tile_ > 0 && run_.row_begin + tile_ * kQueryTileRows >= run_.row_end) {
      run_ = *next_run_++;
      tile_ = 0;
    }
    const int row_begin = run_.row_begin + tile_ * kQueryTileRows;
    return {row_begin, min(kQueryTileRows, run_.row_end - row_begin), run_.first_tile + tile_};
  }

  // The visit of the tile that next() gave.
  __device__ DqVisit visit(const QueryTile& tile) const {
    const SumsOfRun sums = run_.sums;
    if (sums.are_shared()) return {tile.row_begin, tile.num_rows, sums.first_shared() + tile_, DqVisit::kShares};
    const int flags =
        (is_first_ && sums.begin() ? DqVisit::kBegins : 0) | (is_last_ && sums.end() ? DqVisit::kEnds : 0);
    return {tile.row_begin, tile.num_rows, sums.first_slot() + tile_, flags};
  }

 private:
  const ListedRun* next_run_;
  bool is_first_, is_last_;
  ListedRun run_;
  int tile_ = -1;
};

}  // namespace mixed_attention::cuda::hopper
