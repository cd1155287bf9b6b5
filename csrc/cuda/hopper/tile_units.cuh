// The units of a key tile's rows on their way from global memory to the scores and weights that they multiply.
#pragma once

#include "cuda/hopper/config.h"
#include "cuda/hopper/work_items.cuh"

namespace mixed_attention::cuda::hopper {

// A warp's share of them, a few rows in each lane.
template <int kBlockN>
struct TileUnitsLoad {
  static_assert(kBlockN % 32 == 0);
  static constexpr int kRows = kBlockN / 32;

  float k[kRows], v[kRows];

  // Of rows past the tile's end nothing is read: they belong to others, whose values the result does not depend on.
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
      units.k[row] = k[i];
      units.v[row] = v[i] * inverse;
    }
    if (threadIdx.x % 32 == 0) units.largest_v = largest;
  }
};

}  // namespace mixed_attention::cuda::hopper
