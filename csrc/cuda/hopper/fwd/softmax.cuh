// Online softmax over the fragments of wgmma: a thread holds two rows of a tile, a quarter of their columns each.
//
// The usual update finds the maximum of every tile before its first exponential. Here the weights are relative to the
// maximum of the first tile, and their sum, which is needed anyway, tells whether one has grown too large for its
// format. Only then is there something to repair: a reference that is too low costs no accuracy, as 16-bit weights are
// as accurate at 2^15 as at 1.
//
// An exponent is the score times the scale less the reference times the scale, and that product is rounded. What it
// lost is a factor of the whole row and does no harm as long as it is about 1. Beyond kMostRounded the reference is
// subtracted from the scores themselves instead, which is exact where it matters; that costs one branch a tile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

#include "cuda/common/row_part.h"
#include "cuda/hopper/fwd/polynomial_exp2.cuh"
#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda::hopper {

// Which of a thread's two rows accumulator i belongs to.
__device__ constexpr int row_of(int i) { return i / 2 % 2; }

// The four threads of a quad share their rows.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Scores of the columns from num_columns on become -inf.
template <int kCount>
__device__ inline void mask_columns(float (&scores)[kCount], int num_columns) {
  const int limit = num_columns - 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (8 * (i / 4) + i % 2 >= limit) scores[i] = -INFINITY;
  }
}

// Largest sum of weights of one thread and tile: fp16 ends at 2^16, bf16 leaves room for large values.
template <typename Element>
constexpr float kWeightLimit = 0x1p12f;
template <>
constexpr float kWeightLimit<__half> = 0x1p15f;
template <>
constexpr float kWeightLimit<float> = 0x1p15f;  // which is multiplied as two of fp16

// The logarithm of the weight that a reference itself gets. Two parts of fp16 hold 22 bits of weights down to 2^-3 and
// an absolute 2^-25 below that, so that those of fp32 begin higher. Values of bf16 may be as large as any number of
// fp32 is, and are added up before the sum is divided by that of the weights: 2^20 of them are to fit.
template <typename Element>
constexpr float kReferenceWeightLog2 = 0;
template <>
constexpr float kReferenceWeightLog2<__nv_bfloat16> = -20;
template <>
constexpr float kReferenceWeightLog2<float> = 8;

// What a row's maximum counts as where it has no finite score yet: no score is lower, and the first higher one
// overflows.
constexpr float kNoReference = std::numeric_limits<float>::lowest();

// References up to here, in units of log 2, are rounded by 2^-5 at most.
constexpr float kMostRounded = 0x1p20f;

// Whether the weight of accumulator i is computed by polynomial: every kEvery-th (0: none).
template <int kEvery>
__device__ constexpr bool is_polynomial(int i) {
  if constexpr (kEvery > 0) return i % kEvery == kEvery - 1;
  return false;
}

// Of the two rows of a thread, which may have a scale each. The sums are those of its own columns until finish(). Bases
// are seldom other than 0 and lie in shared memory: that of even threads, own_base, is the first row's, that of odd
// ones the other's.
struct OnlineSoftmax {
  float offset[2];  // a weight is 2^(scale_log2 * (score - base) - offset)
  float row_sum[2];
  float tile_sum[2];

  // Takes the references from an item's first scores.
  template <typename Element, int kCount>
  __device__ void start(const float (&scores)[kCount], const float (&scale_log2)[2], float& own_base) {
    float base[2];
    find_references<Element>(base, offset, scores, scale_log2);
    keep_bases(base, own_base);
    row_sum[0] = row_sum[1] = 0;
  }

  // Gives rows whose weights overflowed the reference of the tile that made them, and takes what was added up before to
  // it: rows of o by the factors. Each row decides by itself, so that none depends on its neighbours.
  template <typename Element, int kCount>
  __device__ void raise(const float (&scores)[kCount], const float (&scale_log2)[2], float (&factor)[2],
                        float& own_base) {
    float base_now[2] = {base_of(0, own_base), base_of(1, own_base)}, new_base[2], new_offset[2];
    find_references<Element>(new_base, new_offset, scores, scale_log2);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const bool grows = quad_max(tile_sum[row]) > kWeightLimit<Element>;
      const float growth = fmaf(base_now[row] - new_base[row], scale_log2[row], offset[row] - new_offset[row]);
      factor[row] = grows ? ptx::exp2(growth) : 1.f;
      base_now[row] = grows ? new_base[row] : base_now[row];
      offset[row] = grows ? new_offset[row] : offset[row];
      row_sum[row] *= factor[row];
    }
    keep_bases(base_now, own_base);
  }

  // Turns scores into weights.
  template <int kPolynomialEvery, int kCount>
  __device__ void weigh(float (&scores)[kCount], const float (&scale_log2)[2], float own_base) {
    if (__any_sync(0xffffffff, own_base != 0)) {
      const float bases[2] = {base_of(0, own_base), base_of(1, own_base)};
#pragma unroll
      for (int i = 0; i < kCount; ++i) scores[i] -= bases[row_of(i)];
    }
    const PolynomialExp2 polynomial[2] = {{scale_log2[0], offset[0]}, {scale_log2[1], offset[1]}};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = row_of(i);
      scores[i] = is_polynomial<kPolynomialEvery>(i) ? polynomial[row](scores[i])
                                                     : ptx::exp2(fmaf(scores[i], scale_log2[row], -offset[row]));
    }
    tile_sum[0] = scores[0];
    tile_sum[1] = scores[2];
#pragma unroll
    for (int i = 1; i < kCount; ++i) {
      if (i != 2) tile_sum[row_of(i)] += scores[i];
    }
  }

  // Whether a weight may have left its format. NaN stays as it is.
  template <typename Element>
  __device__ bool overflows() const {
    return tile_sum[0] > kWeightLimit<Element> || tile_sum[1] > kWeightLimit<Element>;
  }

  // Of weights under a reference of their own tile, which are 1 at most: a larger sum comes from a score of NaN or
  // infinity in a column of the polynomial's, and is to show.
  template <typename Element>
  __device__ void settle() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (tile_sum[row] > kWeightLimit<Element>) tile_sum[row] = NAN;
    }
  }

  __device__ void add_tile() {
    row_sum[0] += tile_sum[0];
    row_sum[1] += tile_sum[1];
  }

  // Sums over whole rows; once, after the last tile. Without a finite score a row has the least that polynomials make,
  // and nothing else; NaN stays.
  __device__ void finish() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = quad_sum(row_sum[row]);
      row_sum[row] = sum < kLeastSum ? 0 : sum;
    }
  }

  // Of a row that is finished; all threads of a warp ask at a time.
  template <typename Element>
  __device__ RowPart part(int row, float own_base) const {
    constexpr float kLog2 = kReferenceWeightLog2<Element>;
    const float base = base_of(row, own_base);
    if (row_sum[row] == 0) return {0, 0, -INFINITY};
    // The logarithm of a number near 1 is exact to more digits than that of a power of two beside.
    const float inverse = __int_as_float((127 - static_cast<int>(kLog2)) << 23);
    return {base, offset[row] + kLog2, log2f(row_sum[row] * inverse)};
  }

 private:
  // Far below the weight of any reference.
  static constexpr float kLeastSum = 0x1p-100f;

  // All threads of a warp ask at a time.
  __device__ static float base_of(int row, float own_base) {
    return __shfl_sync(0xffffffff, own_base, threadIdx.x % 32 / 4 * 4 + row);
  }

  __device__ static void keep_bases(const float (&base)[2], float& own_base) {
    own_base = threadIdx.x % 2 == 0 ? base[0] : base[1];
  }

  template <typename Element, int kCount>
  __device__ static void find_references(float (&base)[2], float (&offset)[2], const float (&scores)[kCount],
                                         const float (&scale_log2)[2]) {
    float tile_max[2] = {scores[0], scores[2]};
#pragma unroll
    for (int i = 0; i < kCount; ++i) tile_max[row_of(i)] = fmaxf(tile_max[row_of(i)], scores[i]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float largest = fmaxf(quad_max(tile_max[row]), kNoReference);
      const float reference = largest * scale_log2[row];
      const bool is_rounded = fabsf(reference) > kMostRounded;
      base[row] = is_rounded ? largest : 0;
      offset[row] = (is_rounded ? 0 : reference) - kReferenceWeightLog2<Element>;
    }
  }
};

}  // namespace mixed_attention::cuda::hopper
