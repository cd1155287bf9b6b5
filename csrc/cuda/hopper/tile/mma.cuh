// MMAs of a warpgroup over tiles in shared memory: issue_* issues one batch and returns at once.
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// d (+)= a bᵀ, summed over the kWidth columns of both: 64 rows at a, as many rows at b as d has columns. Within a
// batch.
template <typename Element, int kWidth, int kSlabBytesA, int kSlabBytesB, int kCount, int kRowBytes>
__device__ inline void add_row_mma(float (&d)[kCount], ptx::SlabOperand<kRowBytes> a, ptx::SlabOperand<kRowBytes> b,
                                   bool overwrites) {
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    const int slab = step * kColumnStepBytes / kRowBytes;
    const int within = step * kColumnStepBytes % kRowBytes;
    ptx::Wgmma<Element, 2 * kCount>::ss(d, a.advance(slab * kSlabBytesA + within).descriptor(),
                                        b.advance(slab * kSlabBytesB + within).descriptor(), step > 0 || !overwrites);
  }
}

// Issues the same with a in registers.
template <typename Element, int kSlabBytesB, int kCount, int kWords, int kRowBytes>
__device__ inline void add_row_mma(float (&d)[kCount], const uint32_t (&a)[kWords], ptx::SlabOperand<kRowBytes> b,
                                   bool overwrites) {
#pragma unroll
  for (int step = 0; step < kWords / 4; ++step) {
    const int slab = step * kColumnStepBytes / kRowBytes;
    const int within = step * kColumnStepBytes % kRowBytes;
    ptx::Wgmma<Element, 2 * kCount>::template rs<true>(
        d, a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3],
        b.advance(slab * kSlabBytesB + within).descriptor(), step > 0 || !overwrites);
  }
}

// d (+)= a b, summed over the columns of a, which lies in registers, and the rows of b. Within a batch.
template <typename Element, int kCount, int kWords, int kRowBytes>
__device__ inline void add_column_mma(float (&d)[kCount], const uint32_t (&a)[kWords], ptx::SlabOperand<kRowBytes> b,
                                      bool overwrites) {
#pragma unroll
  for (int step = 0; step < kWords / 4; ++step) {
    ptx::Wgmma<Element, 2 * kCount>::rs(d, a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3],
                                        b.advance(step * 16 * kRowBytes).descriptor(), step > 0 || !overwrites);
  }
}

// d = a bᵀ.
template <typename Element, int kWidth, int kSlabBytesA, int kSlabBytesB, int kCount, int kRowBytes>
__device__ inline void issue_row_mma(float (&d)[kCount], ptx::SlabOperand<kRowBytes> a, ptx::SlabOperand<kRowBytes> b) {
  ptx::wgmma_fence();
  add_row_mma<Element, kWidth, kSlabBytesA, kSlabBytesB>(d, a, b, true);
  ptx::wgmma_commit();
}

// d += a b.
template <typename Element, int kCount, int kWords, int kRowBytes>
__device__ inline void issue_column_mma(float (&d)[kCount], const uint32_t (&a)[kWords],
                                        ptx::SlabOperand<kRowBytes> b) {
  ptx::wgmma_fence();
  add_column_mma<Element>(d, a, b, false);
  ptx::wgmma_commit();
}

// d = aᵀ b, or with kAdds d += aᵀ b, summed over the kDepth rows of both: 64 columns at a, one slab, as many columns at
// b as d has.
template <typename Element, int kDepth, bool kAdds = false, int kCount, int kRowBytesA, int kRowBytesB>
__device__ inline void issue_transposed_mma(float (&d)[kCount], ptx::SlabOperand<kRowBytesA> a,
                                            ptx::SlabOperand<kRowBytesB> b) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    ptx::Wgmma<Element, 2 * kCount>::template ss<true>(d, a.advance(step * 16 * kRowBytesA).descriptor(),
                                                       b.advance(step * 16 * kRowBytesB).descriptor(),
                                                       kAdds || step > 0);
  }
  ptx::wgmma_commit();
}

// Rounds a result to the operand of the next MMA: the layouts agree, nothing moves between threads.
template <typename Element, int kCount>
__device__ inline void round_operand(uint32_t (&operand)[kCount / 2], const float (&result)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) operand[i] = ptx::pack<Element>(result[2 * i], result[2 * i + 1]);
}

}  // namespace mixed_attention::cuda::hopper
