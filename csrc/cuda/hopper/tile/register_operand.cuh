// Tiles that stay, as operands of many MMAs: a warpgroup reads its share out of shared memory once, into registers.
//
// Both operands of an MMA of 64 x 64 results in shared memory keep that busy for as long as the tensor cores multiply;
// with one of them in registers it is half of the time.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/ptx/lane.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/shared_address.cuh"

namespace mixed_attention::cuda::hopper {

// The offset at which TMA's swizzle puts the 16 bytes of this offset into a tile whose rows, or their slabs, are
// kRowBytes long.
template <int kRowBytes>
__device__ inline int swizzled(int offset) {
  return offset ^ (offset / 8 & (kRowBytes - 16));
}

// This warp's 16 rows from first_row on, as operand a. Slabs of which has_slab(slab) is false become zeros.
template <int kRowBytes, int kSlabBytes, int kWords, typename HasSlab>
__device__ inline void load_row_operand(uint32_t (&operand)[kWords], const void* tile, int first_row,
                                        const HasSlab& has_slab) {
  const int lane = ptx::lane_anew();
  const int row = first_row + lane % 16;
#pragma unroll
  for (int step = 0; step < kWords / 4; ++step) {
    const int column = step * kColumnStepBytes + lane / 16 * 16;
    const auto* slab = static_cast<const unsigned char*>(tile) + column / kRowBytes * kSlabBytes;
    uint32_t words[4] = {};
    if (has_slab(step * kColumnStepBytes / kRowBytes)) {
      ptx::ldmatrix_x4(words, ptx::shared_address(slab + swizzled<kRowBytes>(row * kRowBytes + column % kRowBytes)));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) operand[4 * step + i] = words[i];
  }
}

// This warp's 16 of 64 columns, one slab, as operand a of the transposed tile.
template <int kWords>
__device__ inline void load_column_operand(uint32_t (&operand)[kWords], const void* tile) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 % 4;
  const int row = lane % 8 + lane / 16 * 8;
  const auto* source =
      static_cast<const unsigned char*>(tile) + swizzled<kRowBytes>(row * kRowBytes + 32 * warp + lane / 8 % 2 * 16);
#pragma unroll
  for (int step = 0; step < kWords / 4; ++step) {
    uint32_t words[4];
    ptx::ldmatrix_x4_trans(words, ptx::shared_address(source + step * kRowStepBytes));
#pragma unroll
    for (int i = 0; i < 4; ++i) operand[4 * step + i] = words[i];
  }
}

}  // namespace mixed_attention::cuda::hopper
