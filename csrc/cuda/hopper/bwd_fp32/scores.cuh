// Weights and gradients of scores from products of parts: units of both factors, one of rows and one of columns, turn a
// product into the number that it stands for.
#pragma once

#include "cuda/common/row_reference.cuh"
#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda::hopper {

// The exponent of a unit, a power of two.
__device__ inline int exponent_of(float unit) { return (__float_as_int(unit) >> 23) - 127; }

// As relate_columns and relate_rows: references(i) is that of accumulator i, whose score is in units of
// units[i] * others[i] / others_scale. Where there is no row or column, units[i] is 0; zero times an
// infinity may have made its score NaN.
template <int kCount, typename References, typename Units, typename OtherUnits>
__device__ __forceinline__ void relate(float (&s)[kCount], const References& references, const Units& units,
                                       const OtherUnits& others, float others_scale) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (units[i] == 0) {
      s[i] = 0;
      continue;
    }
    const int exponent = exponent_of(units[i]) + exponent_of(others[i] / others_scale);
    RowReference reference = references(i);
    reference.score = scalbnf(reference.score, -exponent);
    reference.slack = scalbnf(reference.slack, -exponent);
    s[i] = relative_score(s[i], reference);
  }
}

// p = exp2(s * units * scaled_units - lse_log2); the latter units have the scale in them. The others are powers of two,
// so that all is rounded once.
template <int kCount, typename Units, typename ScaledUnits, typename Lse>
__device__ inline void weigh(float (&s)[kCount], const Units& units, const ScaledUnits& scaled_units,
                             const Lse& lse_log2) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = ptx::exp2(fmaf(s[i] * units[i], scaled_units[i], -lse_log2[i]));
}

// Turns dp into ds * weights, ds = p (dp * units * other_units - delta).
template <int kCount, typename Units, typename OtherUnits, typename Delta, typename Weights>
__device__ inline void differentiate(float (&dp)[kCount], const float (&p)[kCount], const Units& units,
                                     const OtherUnits& other_units, const Delta& delta, const Weights& weights) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    dp[i] = p[i] * weights[i] * fmaf(dp[i] * units[i], other_units[i], -delta[i]);
  }
}

}  // namespace mixed_attention::cuda::hopper
