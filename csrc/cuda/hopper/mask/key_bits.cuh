// The bits of a padding mask, one for each key of a tile, from global memory to the scores.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/mask/mask.h"
#include "cuda/hopper/plan/work_items.cuh"

namespace mixed_attention::cuda::hopper {

// Puts a tile's bits into shared memory, keys past its end as masked; key_mask_bits: those of its sequence.
__device__ inline void gather_key_bits(uint32_t (&bits)[kKeyBitWords], const uint32_t* key_mask_bits, KeyTile tile) {
  static_assert(kKeyBitWords <= MaskedKeys::kSpareWords, "the last tile of keys reads bits behind the mask");
  const uint32_t* source = key_mask_bits + tile.row_begin / 32;
#pragma unroll
  for (int i = 0; i < kKeyBitWords; ++i) {
    const uint32_t word = __funnelshift_r(source[i], source[i + 1], tile.row_begin % 32);
    const int num_keys = max(tile.num_rows - 32 * i, 0);
    bits[i] = num_keys >= 32 ? word : word & ((1u << num_keys) - 1);
  }
}

// Scores of masked keys become -inf, whatever they are.
template <int kCount>
__device__ inline void mask_keys(float (&scores)[kCount], const uint32_t (&bits)[kKeyBitWords]) {
  static_assert(2 * kCount <= 32 * kKeyBitWords && kKeyBitWords == 4, "a tile has more keys than bits");
  const uint4 words = *reinterpret_cast<const uint4*>(bits);
  __syncwarp();  // all have read: from here on one thread of the warp may release the tile
  const int first_column = 2 * (threadIdx.x % 4);
  const uint32_t own[] = {words.x >> first_column, words.y >> first_column, words.z >> first_column,
                          words.w >> first_column};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = 8 * (i / 4) + i % 2;  // from the first one on
    if ((own[column / 32] >> column % 32 & 1) == 0) scores[i] = -INFINITY;
  }
}

}  // namespace mixed_attention::cuda::hopper
