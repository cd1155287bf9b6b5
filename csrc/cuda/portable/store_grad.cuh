// From accumulators to gradients in memory.
#pragma once

#include "cuda/portable/tensor_core.cuh"
#include "cuda/portable/tile.cuh"
#include "cuda/portable/tile_iterator.cuh"

namespace mixed_attention::cuda::portable {

// The accumulators' way out: to a split's place in scratch, or times factor to the gradient, through shared memory.
// They begin at row warp_row and column warp_col of the tile.
template <int kWarpRows, class Element, int kRows, int kCols, int kTilesM, int kTilesN>
__device__ void store_grad(float (&grad)[kTilesM][kTilesN][4], float factor, float* partial,
                           SharedTile<Element, kRows, kCols>& staging, const GlobalRows<Element>& rows, int warp_row,
                           int warp_col, const WorkItem& item) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) grad[m][n][e] *= factor;
    }
  }
  const int row_begin = item.row_begin + warp_row, num_rows = min(kWarpRows, item.num_rows - warp_row);
  if (partial != nullptr) {
    store_fp32(partial + static_cast<int64_t>(row_begin) * rows.num_cols, rows.num_cols, num_rows, warp_col, grad);
    return;
  }
  put_accumulators(staging, warp_row, warp_col, grad);
  __syncwarp();
  store_rows<kWarpRows, 8 * kTilesN>(staging, warp_row, warp_col, rows, row_begin, num_rows);
}

}  // namespace mixed_attention::cuda::portable
