// The units of a key tile's rows on their way from global memory to the scores and weights that they multiply.
#pragma once

#include <limits>

#include "cuda/hopper/config.h"
#include "cuda/hopper/plan/work_items.cuh"

namespace mixed_attention::cuda::hopper {

// Scores are products of fp16 parts, up to 2^37, times units of keys, up to 2^113: these leave a part of theirs to the
// queries' rows, so that a key of the largest numbers there are has finite scores.
inline constexpr float kKeyUnitShare = 0x1p-16f;

// The output is summed up in such a share of itself, as its weights begin at 2^8 and are divided by their sum at the
// end.
inline constexpr float kValueUnitShare = 0x1p-22f;

// The scale of a row's scores, whose unit is that of its query.
__device__ inline float scale_of_row(float scale, float unit) {
  return fminf(scale / kKeyUnitShare * unit, std::numeric_limits<float>::max());
}

// The units of a head's rows, from row 0 on; batch_step: 1, or 0 where one sequence serves the whole batch.
template <typename Rows>
__device__ inline const float* units_of_head(const float* units, const Rows& rows, int batch_step, int num_heads,
                                             int64_t seqlen) {
  return units + (rows.batch * batch_step * num_heads + rows.head) * seqlen;
}

// A warp's share of them, a few rows in each lane.
template <int kBlockN>
struct TileUnitsLoad {
  static_assert(kBlockN % 32 == 0);
  static constexpr int kRows = kBlockN / 32;

  float k[kRows], v[kRows];

  // Nothing is read of rows past the tile's end: they belong to others, whose values the result does not depend on.
  __device__ TileUnitsLoad(const float* k_units, const float* v_units, KeyTile tile) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = threadIdx.x % 32 + 32 * i;
      const bool is_key = row < tile.num_rows;
      k[i] = is_key ? k_units[tile.row_begin + row] : 0.f;
      v[i] = is_key ? v_units[tile.row_begin + row] : 0.f;
    }
  }

  __device__ void store(TileUnits<kBlockN>& units) const {
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
      units.k[row] = k[i] * kKeyUnitShare;
      units.v[row] = v[i] * inverse;
    }
    if (threadIdx.x % 32 == 0) units.largest_v = largest * kValueUnitShare;
  }
};

}  // namespace mixed_attention::cuda::hopper
