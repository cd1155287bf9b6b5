// Softmax over scores that come block by block. p is relative to the softmax_base of its row, at first its maximum,
// which is raised only when the maximum outgrows it by far: what was accumulated is then rescaled.
//
// A softmax_base is a score times the scale, rounded. What it lost is a factor of the whole row and does no harm as
// long as it is about 1. Beyond kMostRounded the row's score is subtracted from the others themselves, which is exact
// where it matters, and they keep a softmax_base of next to nothing; that costs one branch a block.
#pragma once

#include <limits>

#include "cuda/common/row_lse.h"
#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda {

// Multiplies a row of accumulators: one of two for each tile of 16.
template <int kTilesM, int kTilesN>
__device__ void scale_row(float (&c)[kTilesM][kTilesN][4], int row, float factor) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    c[row / 2][n][row % 2 * 2] *= factor;
    c[row / 2][n][row % 2 * 2 + 1] *= factor;
  }
}

// The rows of one thread in the layout of mma's accumulators: 2 for each tile of 16; four lanes share a row.
template <int kTilesM>
class WarpSoftmax {
 public:
  __device__ WarpSoftmax() {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      softmax_base_[row] = kLowest;
      sum_[row] = 0;
    }
  }

  // Makes each softmax_base fit a block of raw scores, and what was accumulated before fit it; each row by itself, so
  // that none depends on its neighbours. scale_log2 is positive. Scores of rows with a large softmax_base become
  // relative to it.
  template <int kTilesN, int kTilesOut>
  __device__ void raise_softmax_bases(float (&s)[kTilesM][kTilesN][4], float (&out)[kTilesM][kTilesOut][4],
                                      float scale_log2) {
    raise_softmax_bases(s, scale_log2, [&](int row, float factor) { scale_row(out, row, factor); });
  }

  // The same of any sums: rescale(row, factor) multiplies those of a row by a factor, which is 1 where its softmax_base
  // stays.
  template <int kTilesN, class Rescale>
  __device__ void raise_softmax_bases(float (&s)[kTilesM][kTilesN][4], float scale_log2, const Rescale& rescale) {
    if (__any_sync(0xFFFFFFFF, own_score_ != 0)) raise_scores(s, scale_log2, rescale);
    float block_max[kRows];
    bool outgrown = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      block_max[row] = max_of_row(s, row);
      outgrown |= fmaf(block_max[row], scale_log2, -softmax_base_[row]) > kMostAboveBase;
    }
    if (!__any_sync(0xFFFFFFFF, outgrown)) return;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float maximum = block_max[row] * scale_log2;
      const bool grows = maximum - softmax_base_[row] > kMostAboveBase;
      const float score = grows && fabsf(maximum) > kMostRounded ? block_max[row] : 0;
      const float softmax_base = !grows ? softmax_base_[row] : score != 0 ? 0 : maximum;
      if (score != 0) {
        subtract(s, row, score);
        keep_score(row, score);
      }
      const float factor = ptx::exp2(fmaf(-score, scale_log2, softmax_base_[row] - softmax_base));
      sum_[row] *= factor;
      rescale(row, factor);
      softmax_base_[row] = softmax_base;
    }
  }

  // Turns scores of a block that fits softmax_base into p, up to a factor per row that the sum has as well:
  // kCount tiles of columns, from tile `first` on.
  template <int kCount, int kTilesN>
  __device__ void exponentiate(float (&s)[kTilesM][kTilesN][4], int first, float scale_log2) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int m = row / 2, e = row % 2 * 2;
      float sum;
#pragma unroll
      for (int n = first; n < first + kCount; ++n) {
        s[m][n][e] = ptx::exp2(fmaf(s[m][n][e], scale_log2, -softmax_base_[row]));
        s[m][n][e + 1] = ptx::exp2(fmaf(s[m][n][e + 1], scale_log2, -softmax_base_[row]));
        const float pair = s[m][n][e] + s[m][n][e + 1];
        sum = n == first ? pair : sum + pair;
      }
      sum_[row] += sum;
    }
  }

  // What a row's p come to so far, of this lane's columns.
  __device__ float sum_of(int row) const { return sum_[row]; }

  // Divides by the sums, if there are any, and multiplies by factor. Returns what the rows come to, without a sum as if
  // there were no key.
  template <int kTilesOut>
  __device__ void finish(float (&out)[kTilesM][kTilesOut][4], RowLse (&rows)[2 * kTilesM], float factor) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int m = row / 2, e = row % 2 * 2;
      float sum = sum_[row];
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
      // Not "sum > 0": a NaN that a query may see must show.
      const float inverse = sum == 0 ? 0.0f : factor / sum;
      const float score = score_of(row);
      rows[row] = sum == 0 ? RowLse{0, 0, -INFINITY} : RowLse{score, softmax_base_[row], log2f(sum)};
#pragma unroll
      for (int n = 0; n < kTilesOut; ++n) {
        out[m][n][e] *= inverse;
        out[m][n][e + 1] *= inverse;
      }
    }
  }

 private:
  static constexpr int kRows = 2 * kTilesM;

  // A power of two: p up to 256 is as exact as up to 1 in every arithmetic, and fits fp16.
  static constexpr float kMostAboveBase = 8;

  // The maximum of a row without keys so far is not -inf, so that no inf - inf arises.
  static constexpr float kLowest = std::numeric_limits<float>::lowest();

  // A softmax_base up to here, in units of log 2, is rounded by 2^-5 at most.
  static constexpr float kMostRounded = 0x1p20f;

  template <int kTilesN>
  __device__ static float max_of_row(const float (&s)[kTilesM][kTilesN][4], int row) {
    const int m = row / 2, e = row % 2 * 2;
    float max = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) max = fmaxf(max, fmaxf(s[m][n][e], s[m][n][e + 1]));
    max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFF, max, 1));
    return fmaxf(max, __shfl_xor_sync(0xFFFFFFFF, max, 2));
  }

  template <int kTilesN>
  __device__ static void subtract(float (&s)[kTilesM][kTilesN][4], int row, float score) {
    const int m = row / 2, e = row % 2 * 2;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      s[m][n][e] -= score;
      s[m][n][e + 1] -= score;
    }
  }

  // The rows of which softmax_base is large.
  template <int kTilesN, class Rescale>
  __device__ void raise_scores(float (&s)[kTilesM][kTilesN][4], float scale_log2, const Rescale& rescale) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float block_max = max_of_row(s, row), score = score_of(row);
      const bool grows = score != 0 && (block_max - score) * scale_log2 > kMostAboveBase;
      if (grows) {
        const float factor = ptx::exp2((score - block_max) * scale_log2);
        sum_[row] *= factor;
        rescale(row, factor);
        keep_score(row, block_max);
      }
      subtract(s, row, grows ? block_max : score);
    }
  }

  // All threads of a warp ask at a time.
  __device__ float score_of(int row) const {
    return __shfl_sync(0xFFFFFFFF, own_score_, threadIdx.x % 32 / 4 * 4 + row);
  }

  __device__ void keep_score(int row, float score) {
    if (threadIdx.x % 4 == row) own_score_ = score;
  }

  float softmax_base_[kRows];  // in units of log 2, beside the row's score
  float sum_[kRows];           // of this lane's columns
  float own_score_ = 0;        // seldom read: each of the lanes that share their rows has one's, 0 but for large scores
};

}  // namespace mixed_attention::cuda
