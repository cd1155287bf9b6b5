// The items of a block of the kernels for gradients of tangents, and the tiles that stream by one of them.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/query_tiles.cuh"
#include "cuda/hopper/bwd_jvp/params.h"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/ring.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
using SideItems = ItemWalk<Config::kBlockM, decltype(BwdJvpKernelParams<Config>::table)>;

// A walk over the tiles, each with row_begin and num_rows.
template <typename Config>
__device__ inline auto tiles_of(const SideItems<Config>& items) {
  if constexpr (Config::kAddsDq) {
    return QueryTileIterator(items.table, items.tiles(), 0);
  } else {
    return KeyTileIterator<Config::kBlockN>(items);
  }
}

// The number of the first query of a sequence and head among those of all.
template <typename Params>
__device__ inline int64_t first_query_of(const Params& params, const ItemRows& rows) {
  return (int64_t{rows.batch} * params.table.num_heads + rows.head) * params.seqlen_q;
}

// The rows that a consumer takes at a time of a tile that streams, counted from the start of the block.
template <typename Config>
struct Step {
  static constexpr int kPerTile = Config::kBlockN / Config::kStepRows;

  uint32_t count;

  __device__ uint32_t tile() const { return count / kPerTile; }
  __device__ RingUse<Config::kStages> use() const { return {tile()}; }
  __device__ int first_row() const { return count % kPerTile * Config::kStepRows; }  // of the tile
  __device__ bool is_last_of_tile() const { return count % kPerTile == kPerTile - 1; }
};

}  // namespace mixed_attention::cuda::hopper
