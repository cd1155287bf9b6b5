// p and ds over the fragments of wgmma: p = exp2(scale_log2 s - lse_log2), ds = p (dp - delta). Scores of rows that
// have a reference (row_reference.h) become relative to it before.
//
// Where queries are rows, a thread keeps the statistics of its two rows; where they are columns, it reads those of a
// tile while it waits for the scores.
#pragma once

#include <cstdint>

#include "cuda/common/row_reference.cuh"
#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <int kCount>
__device__ inline void scale_all(float (&x)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= factor;
}

template <int kCount>
__device__ inline void multiply_all(float (&x)[kCount], const float (&factors)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= factors[i];
}

// A thread's statistics of the columns of a tile, read from shared memory, where they lie as place_of_stats says.
template <int kColumns>
class ColumnStats {
 public:
  __device__ void load(const float* stats) {
    const float* own = stats + 4 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) fours_[i] = *reinterpret_cast<const float4*>(own + 16 * i);
  }

  // The statistic of the column of accumulator i.
  __device__ float operator[](int i) const {
    const float4& four = fours_[i / 8];
    return i % 8 < 4 ? (i % 2 == 0 ? four.x : four.y) : (i % 2 == 0 ? four.z : four.w);
  }

 private:
  float4 fours_[kColumns / 16];
};

// True if the scores of a tile of queries have to become relative.
__device__ inline bool is_marked(const float* lse_tile) { return lse_tile[kMarkPlace] != 0; }

// Scores that are NaN, as those of no query may be, become 0.
// NOTE: a call, which the compiler would make of what many kernels share, costs them registers.
template <int kCount>
__device__ __forceinline__ void relate_columns(float (&s)[kCount], const float* lse_tile) {
  const auto* own = *reinterpret_cast<const RowReference* const*>(lse_tile + kQueryTileRows) + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const RowReference reference = own[2 * i + column];
      s[i + column] = relative_score(s[i + column], reference);
      s[i + 2 + column] = relative_score(s[i + 2 + column], reference);
    }
  }
}

// references: that of the thread's first row.
template <int kCount>
__device__ __forceinline__ void relate_rows(float (&s)[kCount], const RowReference* references) {
  const RowReference own[2] = {references[0], references[8]};
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = relative_score(s[i], own[row_of(i)]);
}

// Exponents of p, computed here: without pin the compiler would do so behind the next barrier.
template <int kCount>
__device__ inline void scale_columns(float (&s)[kCount], float scale_log2, const ColumnStats<2 * kCount>& lse_log2) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = fmaf(s[i], scale_log2, -lse_log2[i]);
  ptx::pin(s);
}

template <int kCount>
__device__ inline void exponentiate_all(float (&s)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = ptx::exp2(s[i]);
}

// Initialises dp with -delta, so that its MMA ends with dp - delta.
template <int kCount>
__device__ inline void start_differences(float (&dp)[kCount], const float* delta) {
  ColumnStats<2 * kCount> stats;
  stats.load(delta);
#pragma unroll
  for (int i = 0; i < kCount; ++i) dp[i] = -stats[i];
  ptx::pin(dp);  // negated here, not where the MMA begins
}

// Turns dp into ds; p[i]: that of accumulator i.
template <int kCount, typename P>
__device__ inline void differentiate_columns(float (&dp)[kCount], const P& p, const float* delta) {
  ColumnStats<2 * kCount> stats;
  stats.load(delta);
#pragma unroll
  for (int i = 0; i < kCount; ++i) dp[i] = p[i] * (dp[i] - stats[i]);
}

template <int kCount>
__device__ inline void exponentiate_rows(float (&s)[kCount], float scale_log2, const float (&lse_log2)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = ptx::exp2(fmaf(s[i], scale_log2, -lse_log2[row_of(i)]));
}

template <int kCount>
__device__ inline void differentiate_rows(float (&dp)[kCount], const float (&p)[kCount], const float (&delta)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) dp[i] = p[i] * (dp[i] - delta[row_of(i)]);
}

// NOTE: ptxas moves exponentials behind the wait for the MMA that they should run under. A store that depends on all of
// them and never happens, as p is not negative, holds them in front of it.
template <int kCount>
__device__ inline void hold_p(const float (&p)[kCount], uint32_t shared_address) {
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
