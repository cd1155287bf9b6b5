// MMAs of fp32 factors in fp16 limbs. With one limb each: the MMA of these. With two: a_low b_high + a_high b_low +
// a_high b_high, in this order, as tensor cores truncate relative to the sum so far.
//
// A tile of 64 columns in shared memory is one slab of its high limbs with one of its low limbs, if any, behind it.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/split_fp16/half_pair.cuh"
#include "cuda/hopper/tile/fragment_values.cuh"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// An operand in registers; the words of each limb, high ones first, lie as those of a 16-bit one.
template <int kLimbs, int kWords>
struct HalfOperand {
  uint32_t limbs[kLimbs][kWords];

  // Two numbers, the word's lower half first.
  __device__ void set(int word, float low, float high) {
    const auto pair = HalfPair<kLimbs>::split(low, high);
#pragma unroll
    for (int limb = 0; limb < kLimbs; ++limb) limbs[limb][word] = pair.limbs[limb];
  }
};

// Issues one batch, the MMAs of two factors: calls add(limb of a, limb of b, whether it is the first) for each of its
// limbs' MMAs, in their order.
template <int kLimbs, typename Add>
__device__ inline void issue_limb_mma(const Add& add) {
  ptx::wgmma_fence();
  if constexpr (kLimbs == 2) {
    add(1, 0, true);
    add(0, 1, false);
  }
  add(0, 0, kLimbs == 1);
  ptx::wgmma_commit();
}

// d = a bᵀ.
template <int kLimbs, int kLimbBytesA, int kLimbBytesB, int kCount>
__device__ inline void issue_half_row_mma(float (&d)[kCount], ptx::Operand a, ptx::Operand b) {
  issue_limb_mma<kLimbs>([&](int limb_a, int limb_b, bool overwrites) {
    add_row_mma<__half, kSlabColumns, kLimbBytesA, kLimbBytesB>(d, a.advance(limb_a * kLimbBytesA),
                                                                b.advance(limb_b * kLimbBytesB), overwrites);
  });
}

// d = a b, a from registers.
template <int kLimbBytes, int kCount, int kLimbs, int kWords>
__device__ inline void issue_half_column_mma(float (&d)[kCount], const HalfOperand<kLimbs, kWords>& a, ptx::Operand b) {
  issue_limb_mma<kLimbs>([&](int limb_a, int limb_b, bool overwrites) {
    add_column_mma<__half>(d, a.limbs[limb_a], b.advance(limb_b * kLimbBytes), overwrites);
  });
}

// Splits a result into the operand of the next MMA; nothing moves between threads. It is multiplied by the factors of
// rows or of columns before, which take it to below 2^16.
template <int kLimbs, int kCount, typename Factors>
__device__ inline void split_operand(HalfOperand<kLimbs, kCount / 2>& operand, const float (&result)[kCount],
                                     const Factors& factors) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    operand.set(i / 2, result[i] * factors[i], result[i + 1] * factors[i + 1]);
  }
}

// The powers of two that take the largest entry of a row to between 2^14 and 2^15, and what undoes them.
struct RowLift {
  RowNumbers factor, inverse;

  template <int kCount>
  __device__ static RowLift of(const float (&x)[kCount]) {
    float largest[2] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) largest[row_of(i)] = fmaxf(largest[row_of(i)], fabsf(x[i]));
    RowLift lift;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      constexpr uint32_t kExponents = 0x7f800000, kOne = 1u << 23;
      // For rows of next to nothing the largest factor that is normal, and so is its inverse.
      const uint32_t exponent = max(__float_as_uint(quad_max(largest[row])) & kExponents, 15 * kOne);
      lift.factor.of_row[row] = __uint_as_float((2 * 127 + 14) * kOne - exponent);
      lift.inverse.of_row[row] = __uint_as_float(exponent - 14 * kOne);
    }
    return lift;
  }
};

// sum += factors * term
template <int kCount>
__device__ inline void add_rows(float (&sum)[kCount], const float (&term)[kCount], const RowNumbers& factors) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = fmaf(term[i], factors[i], sum[i]);
}

}  // namespace mixed_attention::cuda::hopper
