// The way of a tile into shared memory: slab by slab of 64 columns, onto a barrier that expects its bytes.
#pragma once

#include <cuda.h>

#include "cuda/hopper/config.h"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace mixed_attention::cuda::hopper {

// Copies kRows rows of a head; map: make_tile_map. Those past the tensor's end arrive as zeros.
template <int kRows, int kHeadDim, typename Element>
__device__ inline void load_rows(Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int row_begin, int head,
                                 int batch) {
#pragma unroll
  for (int slab = 0; slab < kHeadDim / kSlabColumns; ++slab) {
    ptx::load_tile(buffer + slab * kRows * kSlabColumns, map, full, slab * kSlabColumns, row_begin, head, batch);
  }
}

// Copies num_rows rows of a head and fills up with zeros to kRows; map: make_clipped_tile_map. What lies behind them
// belongs to others, and 0 * NaN would reach the results.
template <int kRows, int kHeadDim, typename Element>
__device__ inline void load_clipped_rows(Element* buffer, const CUtensorMap& map, ptx::Mbarrier& full, int row_begin,
                                         int num_rows, int head, int batch) {
#pragma unroll
  for (int slab = 0; slab < kHeadDim / kSlabColumns; ++slab) {
    ptx::load_tile(buffer + slab * kRows * kSlabColumns, map, full, slab * kSlabColumns, kRows - num_rows,
                   row_begin + num_rows, head, batch);
  }
}

}  // namespace mixed_attention::cuda::hopper
