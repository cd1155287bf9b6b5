// The tangent of a softmax beside it. For a row, with p its weights, s' the tangents of its scores and any number c,
//
//   h = p (s' - c)     r = sum of h     a = sum of (h v + p v')     lse' = r / l + c     out' = a / l - (r / l) out
//
// with l the sum of p. c is the row's mean of s' so far, taken anew with every tile that weighs more than an eighth of
// those before: so neither a part that all s' of a row share cancels in rounded sums, nor the s' of a key that has
// nearly all of the weight. As h is linear in c, a tile's h are made by the mean before it, and corrected where that
// moves: nothing waits for the mean.
#pragma once

#include "cuda/hopper/fwd/softmax.cuh"

namespace mixed_attention::cuda::hopper {

// Numbers whose tangents are computed beside them. p multiplies s' in their format, which leaves room in fp16 for s' of
// a thousand.
template <typename Element>
struct WithTangents {};
template <>
constexpr float kMaxTileSum<WithTangents<__half>> = 0x1p6f;
template <>
constexpr float kExactBaseLog2OfP<WithTangents<__nv_bfloat16>> = kExactBaseLog2OfP<__nv_bfloat16>;

// Adds rows times the numbers of a thread's two rows.
template <int kCount>
__device__ inline void add_rows(float (&sums)[kCount], const float (&rows)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = fmaf(factor[row_of(i)], rows[i], sums[i]);
}

// The state of a thread's two rows. Sums are those of its own columns until the end.
struct TangentSums {
  float mean[2];      // c
  float sum[2];       // r, without the last tile's
  float tile_sum[2];  // the last tile's share of it

  __device__ void start() { mean[0] = mean[1] = sum[0] = sum[1] = 0; }

  // Turns products of rows, x, into h.
  template <int kCount>
  __device__ void weigh(float (&x)[kCount], const float (&p)[kCount], float scale) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = row_of(i);
      x[i] = p[i] * fmaf(x[i], scale, -mean[row]);
      tile_sum[row] = i == 0 || i == 2 ? x[i] : tile_sum[row] + x[i];
    }
  }

  __device__ bool is_finite() const { return isfinite(tile_sum[0]) && isfinite(tile_sum[1]); }

  __device__ void scale(const float (&factor)[2]) {
    sum[0] *= factor[0];
    sum[1] *= factor[1];
  }

  // Takes in the last tile, whose p the softmax has not added yet, and moves the means that it weighs much in. Each row
  // decides by itself. correct(change) adds change[row] p to h, and change[row] times the output so far to a.
  template <typename Correct>
  __device__ void add_tile(const OnlineSoftmax& softmax, const Correct& correct) {
    unsigned lanes[2];  // of the warp, by row: those that ask for it
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      lanes[row] = __ballot_sync(0xffffffff, softmax.tile_sum[row] > 0.125f * softmax.row_sum[row]);
      sum[row] += tile_sum[row];
    }
    if ((lanes[0] | lanes[1]) == 0) return;
    float change[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float mass = softmax.row_sum[row] + softmax.tile_sum[row];
      const float moved = __fdividef(quad_sum(sum[row]), quad_sum(mass));
      const bool moves = (lanes[row] >> threadIdx.x % 32 / 4 * 4 & 15) != 0 && isfinite(moved);
      change[row] = moves ? -moved : 0;
      mean[row] -= change[row];
      sum[row] = fmaf(change[row], mass, sum[row]);
    }
    correct(change);
  }
};

}  // namespace mixed_attention::cuda::hopper
