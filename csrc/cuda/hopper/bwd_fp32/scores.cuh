// p and ds from MMAs of limbs: row_scales of both factors, one of rows and one of columns, turn a product into the
// number that it stands for.
#pragma once

#include "cuda/common/row_reference.cuh"
#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda::hopper {

// The exponent of a row_scale, a power of two.
__device__ inline int exponent_of(float row_scale) { return (__float_as_int(row_scale) >> 23) - 127; }

// Makes scores relative, as relate_columns and relate_rows do. references(i) is that of accumulator i, whose score is
// times row_scales[i] * others[i] / others_scale. Where there is no row or column, row_scales[i] is 0; zero times an
// infinity may have made its score NaN.
template <int kCount, typename References, typename RowScales, typename OtherScales>
__device__ __forceinline__ void relate(float (&s)[kCount], const References& references, const RowScales& row_scales,
                                       const OtherScales& others, float others_scale) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (row_scales[i] == 0) {
      s[i] = 0;
      continue;
    }
    const int exponent = exponent_of(row_scales[i]) + exponent_of(others[i] / others_scale);
    RowReference reference = references(i);
    reference.score = scalbnf(reference.score, -exponent);
    reference.slack = scalbnf(reference.slack, -exponent);
    s[i] = relative_score(s[i], reference);
  }
}

// p = exp2(s * row_scales * softmax_scales - lse_log2); the latter have the softmax scale in them. The others are
// powers of two, so that all is rounded once.
template <int kCount, typename RowScales, typename SoftmaxScales, typename Lse>
__device__ inline void exponentiate(float (&s)[kCount], const RowScales& row_scales,
                                    const SoftmaxScales& softmax_scales, const Lse& lse_log2) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = ptx::exp2(fmaf(s[i] * row_scales[i], softmax_scales[i], -lse_log2[i]));
}

// Turns dp into ds * factors, ds = p (dp * row_scales * other_scales - delta).
template <int kCount, typename RowScales, typename OtherScales, typename Delta, typename Factors>
__device__ inline void differentiate(float (&dp)[kCount], const float (&p)[kCount], const RowScales& row_scales,
                                     const OtherScales& other_scales, const Delta& delta, const Factors& factors) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    dp[i] = p[i] * factors[i] * fmaf(dp[i] * row_scales[i], other_scales[i], -delta[i]);
  }
}

}  // namespace mixed_attention::cuda::hopper
