// Changes to a warp's scores in registers: reference, mask, dropout.
//
// A thread's elements [m][n][e] stand at rows 16m + lane / 4 + e / 2 * 8 and columns 8n + lane % 4 * 2 + e % 2.
#pragma once

#include "cuda/common/row_reference.cuh"
#include "cuda/portable/dropout.cuh"
#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda::portable {

// A score as the backward takes it where MMAs lose infinities (tensor_core.cuh) and leave NaN. In a row whose
// log-sum-exp is a number the p of an infinite score is 0; in one whose log-sum-exp is NaN so is every p.
template <bool kLosesInfinities>
__device__ __forceinline__ float restored_score(float score) {
  if constexpr (!kLosesInfinities) return score;
  return fmaxf(score, -INFINITY);
}

// p of a score, by a log-sum-exp to base 2.
template <class Mma>
__device__ __forceinline__ float p_of(float score, float scale_log2, float lse_log2) {
  return ptx::exp2(fmaf(restored_score<Mma::kLosesInfinities>(score), scale_log2, -lse_log2));
}

// Scores of rows that have a reference become relative to it; references: from that of this thread's first row on, of
// which num_rows exist.
template <bool kLosesInfinities, int kTilesM, int kTilesN>
__device__ void relate_rows(float (&s)[kTilesM][kTilesN][4], const RowReference* references, int num_rows) {
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    if (8 * i >= num_rows) continue;
    const RowReference own = references[8 * i];
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = s[i / 2][n][i % 2 * 2 + e];
        score = relative_score(restored_score<kLosesInfinities>(score), own);
      }
    }
  }
}

// Scores of columns from num_columns on become 0: what fills up a block is zero, and zero times infinity is NaN.
template <int kTilesM, int kTilesN>
__device__ void clear_columns(float (&s)[kTilesM][kTilesN][4], int num_columns) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // Signed: in warps whose queries all lie behind the block's end, num_columns is negative.
      const int column = 8 * n + threadIdx.x % 4 * 2 + e;
      if (column < num_columns) continue;
#pragma unroll
      for (int i = 0; i < 2 * kTilesM; ++i) s[i / 2][n][i % 2 * 2 + e] = 0;
    }
  }
}

// The same as relate_rows of columns; references: from that of column 0 on.
template <bool kLosesInfinities, int kTilesM, int kTilesN>
__device__ void relate_columns(float (&s)[kTilesM][kTilesN][4], const RowReference* references, int num_columns) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * n + threadIdx.x % 4 * 2 + e;
      if (column >= num_columns) continue;
      const RowReference own = references[column];
#pragma unroll
      for (int i = 0; i < 2 * kTilesM; ++i) {
        float& score = s[i / 2][n][i % 2 * 2 + e];
        score = relative_score(restored_score<kLosesInfinities>(score), own);
      }
    }
  }
}

// Scores of keys behind the block's end, or blocked by the mask, become -inf.
template <int kTilesM, int kTilesN>
__device__ void mask_columns(float (&s)[kTilesM][kTilesN][4], int num_visible, const bool* mask) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = 8 * n + threadIdx.x % 4 * 2 + e;
      if (col < num_visible && (mask == nullptr || mask[col])) continue;
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) s[m][n][e] = s[m][n][e + 2] = -INFINITY;
    }
  }
}

// Calls visit(p, dropout's factor). row = this thread's first query; x = where in its range column 0 stands, a multiple
// of 32 or of the block's rows if they are fewer, so that one draw serves four tiles.
template <int kTilesM, int kTilesN, class Visit>
__device__ void visit_factors(float (&p)[kTilesM][kTilesN][4], const Dropout& dropout, int row, int range_index, int x,
                              const Visit& visit) {
  if constexpr (kTilesN % 4 == 0) __builtin_assume(x % 32 == 0);  // which word of a draw is a tile's is then constant
  const int x_thread = x + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    uint4 words;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      if (n % 4 == 0) words = dropout.draw(row + 8 * i, range_index, x_thread + 8 * n);
#pragma unroll
      for (int e = 0; e < 2; ++e) visit(p[i / 2][n][i % 2 * 2 + e], dropout.factor(words, x_thread + 8 * n + e));
    }
  }
}

// Multiplies p by dropout's factors.
template <int kTilesM, int kTilesN>
__device__ void drop_columns(float (&p)[kTilesM][kTilesN][4], const Dropout& dropout, int row, int range_index, int x) {
  visit_factors(p, dropout, row, range_index, x, [](float& value, float factor) { value *= factor; });
}

}  // namespace mixed_attention::cuda::portable
