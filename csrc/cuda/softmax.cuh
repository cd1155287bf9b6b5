// Softmax over scores that come block by block: running maximum and sum of each row, rescaled when the maximum grows.
#pragma once

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
      max_[row] = -INFINITY;
      sum_[row] = 0;
    }
  }

  // Turns a block of raw scores into probabilities, up to a factor per row that the sum has as well, and brings what
  // was accumulated before to the same factor. scale_log2 is positive.
  template <int kTilesN, int kTilesOut>
  __device__ void update(float (&s)[kTilesM][kTilesN][4], float (&out)[kTilesM][kTilesOut][4], float scale_log2) {
    float factor[2 * kTilesM];
    bool grew = false;
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
      const int m = row / 2, e = row % 2 * 2;
      float block_max = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) block_max = fmaxf(block_max, fmaxf(s[m][n][e], s[m][n][e + 1]));
      block_max = fmaxf(block_max, __shfl_xor_sync(0xFFFFFFFF, block_max, 1));
      block_max = fmaxf(block_max, __shfl_xor_sync(0xFFFFFFFF, block_max, 2));
      const float maximum = fmaxf(max_[row], block_max * scale_log2);
      // A row without keys so far: 0 stands for the maximum, so that no inf - inf arises.
      const float offset = maximum == -INFINITY ? 0.0f : maximum;
      const float rescale = ptx::exp2(max_[row] - offset);
      max_[row] = maximum;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        s[m][n][e] = ptx::exp2(fmaf(s[m][n][e], scale_log2, -offset));
        s[m][n][e + 1] = ptx::exp2(fmaf(s[m][n][e + 1], scale_log2, -offset));
        sum += s[m][n][e] + s[m][n][e + 1];
      }
      sum_[row] = sum_[row] * rescale + sum;
      factor[row] = rescale;
      grew |= rescale != 1;
    }
    // After the first blocks the maximum seldom grows: then nothing need be done.
    if (!__any_sync(0xFFFFFFFF, grew)) return;
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
#pragma unroll
      for (int n = 0; n < kTilesOut; ++n) {
        out[row / 2][n][row % 2 * 2] *= factor[row];
        out[row / 2][n][row % 2 * 2 + 1] *= factor[row];
      }
    }
  }

  // Divides by the sums. Returns through lse the natural log-sum-exps: -inf for rows without keys, whose output is 0.
  template <int kTilesOut>
  __device__ void finish(float (&out)[kTilesM][kTilesOut][4], float (&lse)[2 * kTilesM]) {
#pragma unroll
    for (int row = 0; row < 2 * kTilesM; ++row) {
      const int m = row / 2, e = row % 2 * 2;
      float sum = sum_[row];
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
      // Not "sum > 0": a NaN that a query may see must show.
      const float inverse = sum == 0 ? 0.0f : 1 / sum;
      lse[row] = sum == 0 ? -INFINITY : max_[row] * kLn2 + logf(sum);
#pragma unroll
      for (int n = 0; n < kTilesOut; ++n) {
        out[m][n][e] *= inverse;
        out[m][n][e + 1] *= inverse;
      }
    }
  }

 private:
  float max_[2 * kTilesM];  // of the scores in units of log 2
  float sum_[2 * kTilesM];  // of this lane's columns
};

}  // namespace mixed_attention::cuda
