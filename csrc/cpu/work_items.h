// The work items that passes are made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ceil_div.h"
#include "cpu/kernels.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {

// Tiles of query rows, longest first, so that no thread is left with a long one at the end.
std::vector<FwdItem> fwd_items(const AttentionParams& params, int64_t rows_of_item);

// Products of scores, and rows of the largest item: by them threads and scratch are chosen.
struct FwdWork {
  int64_t operations, rows;
};
FwdWork work_of(const AttentionParams& params, const std::vector<FwdItem>& items);

// Rows of an item: as many as share the packing of keys, fewer where threads would have nothing to do. What comes out
// of a row does not depend on its neighbours.
int64_t rows_of_item(const AttentionParams& params, int64_t most_rows);

// One head's tiles of keys with their visits; the same for every batch and head.
struct VisitedTiles {
  struct Tile {
    Range keys;
    size_t first_visit, num_visits;
  };
  std::vector<Tile> tiles;
  std::vector<Visit> visits;
  std::vector<Range> unvisited;  // query rows without keys
  int64_t tiles_per_head = 0;    // query tiles
};
VisitedTiles visit_tiles_of_keys(const Schedule& schedule, int64_t keys_of_item);

// Calls run(item, scratch) for the tiles of every batch and head, in the order that visits wait for each other in.
template <class Run>
void for_each_tile(const AttentionParams& params, const VisitedTiles& plan, int64_t operations, int64_t scratch_size,
                   Run run) {
  const int64_t num_tiles = static_cast<int64_t>(plan.tiles.size());
  const int64_t num_items = params.batch_size * params.num_heads * num_tiles;
  for_each_item(params.parallel_for, num_workers(params, num_items, operations), num_items, scratch_size,
                [&](int64_t index, void* scratch) {
                  const VisitedTiles::Tile& tile = plan.tiles[index % num_tiles];
                  const int64_t batch_head = index / num_tiles;
                  const BwdItem item{batch_head / params.num_heads, batch_head % params.num_heads, tile.keys,
                                     plan.visits.data() + tile.first_visit, static_cast<int64_t>(tile.num_visits)};
                  run(item, scratch);
                });
}

// Calls run(batch, head, rows) for the query rows of every batch and head, of which an item has so many: what is a
// number for each row.
template <class Run>
void for_each_rows(const AttentionParams& params, int64_t operations, Run run) {
  constexpr int64_t kRows = 1024;
  const int64_t tiles = ceil_div(params.seqlen_q, kRows), num_items = params.batch_size * params.num_heads * tiles;
  for_each_item(params.parallel_for, num_workers(params, num_items, operations), num_items, 0,
                [&](int64_t index, void*) {
                  const int64_t begin = index % tiles * kRows, batch_head = index / tiles;
                  run(batch_head / params.num_heads, batch_head % params.num_heads,
                      Range{begin, std::min(begin + kRows, params.seqlen_q)});
                });
}

// Waits until as many visits have added their part.
void wait_until(const int* progress, int rank);

// What weights of rows with a large log-sum-exp are relative to: for each row of a call a maximum, then for each the
// logarithm of a sum. Only these are written; nothing is there without such rows.
struct MeasuredRows {
  AlignedMemory memory;
  const void *row_max = nullptr, *row_log2_sum = nullptr;
};
MeasuredRows measure_rows(const AttentionParams& params, const void* lse, const AttentionKernels& kernels);

int64_t element_size(DType dtype);

// Writes zeros to rows of every batch and head of a tensor.
void zero_rows(const AttentionParams& params, Range rows, void* out, const Strides& strides, int64_t size);

}  // namespace mixed_attention::cpu
