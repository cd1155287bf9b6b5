// fp32 tensors come in as limbs and leave as they are.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/hopper/bwd_fp32/params.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace mixed_attention::cuda::hopper {

__device__ inline LimbSteps limb_steps(const Fp32DkDvKernelParams& params) { return params.inputs.limb_steps; }
__device__ inline LimbSteps limb_steps(const Fp32DqKernelParams& params) { return params.inputs.limb_steps; }
__device__ inline const QueryNumbers* q_stats_of(const Fp32QueryStats& stats, int64_t tile) { return stats.q + tile; }
__device__ inline const DoutNumbers* dout_stats_of(const Fp32QueryStats& stats, int64_t tile) {
  return stats.dout + tile;
}

// Writes this warp's 16 rows of a result, the first num_rows and num_columns of them. A quad has 32 bytes of a row.
template <int kCount>
__device__ inline void store_fp32_rows(const float (&result)[kCount], float* target, int64_t row_stride, int num_rows,
                                       int num_columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    if (row >= num_rows) continue;
#pragma unroll
    for (int column = 0; column < 2 * kCount; column += 8) {
      const float* pair = result + column / 2 + 2 * i;
      if (column < num_columns) {
        *reinterpret_cast<float2*>(target + row * row_stride + column + lane % 4 * 2) = make_float2(pair[0], pair[1]);
      }
    }
  }
}

}  // namespace mixed_attention::cuda::hopper
