// A dropped p carries a minus sign until its score's gradient is known: both m and p stand in one register.
#pragma once

#include "cuda/portable/dropout.cuh"
#include "cuda/portable/scores.cuh"

namespace mixed_attention::cuda::portable {

template <int kTilesM, int kTilesN>
__device__ void mark_dropped(float (&p)[kTilesM][kTilesN][4], const Dropout& dropout, int query_row, int range_index,
                             int key) {
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& value = p[i / 2][n][i % 2 * 2 + e];
        const int row = query_row + 8 * n + threadIdx.x % 4 * 2 + e;
        if (dropout.factor_at(row, range_index, key + 8 * i) == 0) value = -value;
      }
    }
  }
}

// The same where rows are queries: drop_columns.
template <int kTilesM, int kTilesN>
__device__ void mark_dropped_columns(float (&p)[kTilesM][kTilesN][4], const Dropout& dropout, int row, int range_index,
                                     int x) {
  visit_factors(p, dropout, row, range_index, x, [](float& value, float factor) {
    if (factor == 0) value = -value;
  });
}

__device__ inline bool is_dropped(float p) { return __float_as_uint(p) >> 31; }

// Zeroes of x what stands where p was dropped.
template <int kTilesM, int kTilesN>
__device__ void zero_where_dropped(float (&x)[kTilesM][kTilesN][4], const float (&p)[kTilesM][kTilesN][4]) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][n][e] = is_dropped(p[m][n][e]) ? 0 : x[m][n][e];
    }
  }
}

template <int kTilesM, int kTilesN>
__device__ void zero_dropped(float (&p)[kTilesM][kTilesN][4]) {
  zero_where_dropped(p, p);
}

// Multiplies dp by dropout's factors, which p was marked with.
template <int kTilesM, int kTilesN>
__device__ void drop_marked(float (&dp)[kTilesM][kTilesN][4], const float (&p)[kTilesM][kTilesN][4], float factor) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dp[m][n][e] = is_dropped(p[m][n][e]) ? 0 : dp[m][n][e] * factor;
    }
  }
}

}  // namespace mixed_attention::cuda::portable
