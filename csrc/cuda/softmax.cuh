// Softmax over scores that come block by block. Probabilities are relative to a base of each row, at first its maximum,
// which is raised only when the maximum outgrows it by far: what was accumulated is then rescaled.
#pragma once

#include <limits>

#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda {

constexpr float kLn2 = 0.69314718055994530942f;

// The rows of one thread in the layout of mma's accumulators: 2 for each tile of 16; four lanes share a row.
template <int kTilesM>
class OnlineSoftmax {
 public:
  __device__ OnlineSoftmax() {
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
      base_[row] = kLowest;
      sum_[row] = 0;
    }
  }

  // Makes the bases fit a block of raw scores, and what was accumulated before fit the bases; each row by itself, so
  // that none depends on its neighbours. scale_log2 is positive.
  template <int kTilesN, int kTilesOut>
  __device__ void raise_bases(const float (&s)[kTilesM][kTilesN][4], float (&out)[kTilesM][kTilesOut][4],
                              float scale_log2) {
    float maximum[2 * kTilesM];
    bool outgrown = false;
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
      const int m = row / 2, e = row % 2 * 2;
      float block_max = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) block_max = fmaxf(block_max, fmaxf(s[m][n][e], s[m][n][e + 1]));
      block_max = fmaxf(block_max, __shfl_xor_sync(0xFFFFFFFF, block_max, 1));
      block_max = fmaxf(block_max, __shfl_xor_sync(0xFFFFFFFF, block_max, 2));
      maximum[row] = block_max * scale_log2;
      outgrown |= maximum[row] - base_[row] > kMostAboveBase;
    }
    if (!__any_sync(0xFFFFFFFF, outgrown)) return;
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
      const float base = maximum[row] - base_[row] > kMostAboveBase ? maximum[row] : base_[row];
      const float factor = ptx::exp2(base_[row] - base);
      base_[row] = base;
      sum_[row] *= factor;
#pragma unroll
      for (int n = 0; n < kTilesOut; ++n) {
        out[row / 2][n][row % 2 * 2] *= factor;
        out[row / 2][n][row % 2 * 2 + 1] *= factor;
      }
    }
  }

  // Turns raw scores of a block whose bases fit into probabilities, up to a factor per row that the sum has as well:
  // kCount tiles of columns, from tile `first` on.
  template <int kCount, int kTilesN>
  __device__ void exponentiate(float (&s)[kTilesM][kTilesN][4], int first, float scale_log2) {
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
      const int m = row / 2, e = row % 2 * 2;
      float sum;
#pragma unroll
      for (int n = first; n < first + kCount; ++n) {
        s[m][n][e] = ptx::exp2(fmaf(s[m][n][e], scale_log2, -base_[row]));
        s[m][n][e + 1] = ptx::exp2(fmaf(s[m][n][e + 1], scale_log2, -base_[row]));
        const float pair = s[m][n][e] + s[m][n][e + 1];
        sum = n == first ? pair : sum + pair;
      }
      sum_[row] += sum;
    }
  }

  // Divides by the sums and multiplies by factor. Returns through lse the natural log-sum-exps: -inf for rows without
  // keys, whose output is 0.
  template <int kTilesOut>
  __device__ void finish(float (&out)[kTilesM][kTilesOut][4], float (&lse)[2 * kTilesM], float factor) {
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
      const int m = row / 2, e = row % 2 * 2;
      float sum = sum_[row];
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
      // Not "sum > 0": a NaN that a query may see must show.
      const float inverse = sum == 0 ? 0.0f : factor / sum;
      lse[row] = sum == 0 ? -INFINITY : base_[row] * kLn2 + logf(sum);
#pragma unroll
      for (int n = 0; n < kTilesOut; ++n) {
        out[m][n][e] *= inverse;
        out[m][n][e + 1] *= inverse;
      }
    }
  }

 private:
  // Powers of two: probabilities up to 256 are as exact as those up to 1 in every arithmetic, and fit fp16.
  static constexpr float kMostAboveBase = 8;

  // Of a row without keys so far: not -inf, so that no inf - inf arises.
  static constexpr float kLowest = -std::numeric_limits<float>::max();

  float base_[2 * kTilesM];  // in units of log 2
  float sum_[2 * kTilesM];   // of this lane's columns
};

}  // namespace mixed_attention::cuda
