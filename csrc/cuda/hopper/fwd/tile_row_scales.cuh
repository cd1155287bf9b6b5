// The row_scales of a key tile's rows on their way from global memory to the scores and p that they multiply.
#pragma once

#include <limits>

#include "cuda/hopper/config.h"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/split_fp16/row_scales.cuh"

namespace mixed_attention::cuda::hopper {

// Scores are products of fp16 limbs, up to 2^37, times row_scales of keys, up to 2^113: these leave a part of theirs to
// the queries' rows, so that a key of the largest numbers there are has finite scores.
inline constexpr float kKeyScaleShare = 0x1p-16f;

// The output is summed up in such a share of itself, as p begins at 2^8 and is divided by its sum at the end.
inline constexpr float kValueScaleShare = 0x1p-22f;

// The scale of a row's scores, whose row_scale is that of its query.
__device__ inline float scale_of_row(float scale, float row_scale) {
  return fminf(scale / kKeyScaleShare * row_scale, std::numeric_limits<float>::max());
}

// A warp's share of them, a few rows in each lane.
template <int kBlockN>
struct TileRowScalesLoad {
  static_assert(kBlockN % 32 == 0, "each lane brings as many rows as the others");
  static constexpr int kRows = kBlockN / 32;

  float k[kRows], v[kRows];

  // Nothing is read of rows past the tile's end: they belong to others, whose values the result does not depend on.
  __device__ TileRowScalesLoad(const float* k_scales, const float* v_scales, KeyTile tile) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = threadIdx.x % 32 + 32 * i;
      const bool is_key = row < tile.num_rows;
      k[i] = is_key ? k_scales[tile.row_begin + row] : 0.f;
      v[i] = is_key ? v_scales[tile.row_begin + row] : 0.f;
    }
  }

  __device__ void store(TileRowScales<kBlockN>& row_scales) const {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) largest = fmaxf(largest, v[i]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, distance));
    }
    const float inverse = __int_as_float((254 << 23) - __float_as_int(largest));  // of a power of two
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = threadIdx.x % 32 + 32 * i;
      row_scales.k[row] = k[i] * kKeyScaleShare;
      row_scales.v[row] = v[i] * inverse;
    }
    if (threadIdx.x % 32 == 0) row_scales.largest_v = largest * kValueScaleShare;
  }
};

}  // namespace mixed_attention::cuda::hopper
