// fp32 tensors come in as limbs and leave as they are.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/hopper/bwd_fp32/params.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/tile/load_tile.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace mixed_attention::cuda::hopper {

// Copies rows as load_rows does, all limbs of them.
template <int kRows, int kLimbs>
__device__ inline void load_half_rows(HalfTile<kLimbs, kRows>& tile, const CUtensorMap& map, const HalfInput& input,
                                      ptx::Mbarrier& full, int row_begin, int head, int batch) {
#pragma unroll
  for (int limb = 0; limb < kLimbs; ++limb) {
    load_rows<kRows, kSlabColumns>(tile[limb], map, full, row_begin, head,
                                   batch * input.batch_step + limb * input.limb_step);
  }
}

// Copies rows as load_clipped_rows does, all limbs of them.
template <int kRows, int kLimbs>
__device__ inline void load_clipped_half_rows(HalfTile<kLimbs, kRows>& tile, const CUtensorMap& map,
                                              const HalfInput& input, ptx::Mbarrier& full, int row_begin, int num_rows,
                                              int head, int batch) {
#pragma unroll
  for (int limb = 0; limb < kLimbs; ++limb) {
    load_clipped_rows<kRows, kSlabColumns>(tile[limb], map, full, row_begin, num_rows, head,
                                           batch * input.batch_step + limb * input.limb_step);
  }
}

// The row_scales of a head's rows, from row 0 on.
__device__ inline const float* row_scales_of_head(const HalfInput& input, int num_heads, int64_t seqlen, int head,
                                                  int batch) {
  return input.row_scales + (int64_t{batch} * input.batch_step * num_heads + head) * seqlen;
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
