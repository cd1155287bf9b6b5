// Weights and gradients of scores over the fragments of wgmma: p = exp2(scale_log2 s - lse_log2), ds = p (dp - delta).
//
// Where queries are rows, a thread has the statistics of its two rows in registers; where they are columns, it reads
// them from shared memory, four at a time.
#pragma once

#include <cstdint>

#include "cuda/hopper/softmax.cuh"
#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda::hopper {

template <int kCount>
__device__ inline void scale_all(float (&x)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= factor;
}

// Calls visit(i, number) for all accumulators i with the number that belongs to their column; numbers lie as
// place_of_stats says.
template <int kCount, typename Visit>
__device__ inline void for_columns(const float* numbers, Visit visit) {
  const float* own = numbers + 4 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; i += 8) {
    const float4 four = *reinterpret_cast<const float4*>(own + 2 * i);
    visit(i, four.x);
    visit(i + 1, four.y);
    visit(i + 2, four.x);
    visit(i + 3, four.y);
    visit(i + 4, four.z);
    visit(i + 5, four.w);
    visit(i + 6, four.z);
    visit(i + 7, four.w);
  }
}

template <int kCount>
__device__ inline void weigh_columns(float (&s)[kCount], float scale_log2, const float* lse_log2) {
  for_columns<kCount>(lse_log2, [&](int i, float lse) { s[i] = ptx::exp2(fmaf(s[i], scale_log2, -lse)); });
}

// Turns dp into ds; p[i]: the weight of accumulator i.
template <int kCount, typename Weights>
__device__ inline void differentiate_columns(float (&dp)[kCount], const Weights& p, const float* delta) {
  for_columns<kCount>(delta, [&](int i, float mean) { dp[i] = p[i] * (dp[i] - mean); });
}

template <int kCount>
__device__ inline void weigh_rows(float (&s)[kCount], float scale_log2, const float (&lse_log2)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = ptx::exp2(fmaf(s[i], scale_log2, -lse_log2[row_of(i)]));
}

template <int kCount>
__device__ inline void differentiate_rows(float (&dp)[kCount], const float (&p)[kCount], const float (&delta)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) dp[i] = p[i] * (dp[i] - delta[row_of(i)]);
}

// NOTE: ptxas moves exponentials behind the wait for the product that they should run under. A store that depends on
// all of them and never happens, as weights are not negative, holds them in front of it.
template <int kCount>
__device__ inline void hold_weights(const float (&p)[kCount], uint32_t shared_address) {
  uint32_t signs = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) signs |= __float_as_uint(p[i]);
  asm volatile(
      "{\n"
      ".reg .pred negative;\n"
      "setp.lt.s32 negative, %1, 0;\n"
      "@negative st.shared.b32 [%0], %1;\n"
      "}\n" ::"r"(shared_address),
      "r"(signs)
      : "memory");
}

}  // namespace mixed_attention::cuda::hopper
