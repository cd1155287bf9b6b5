// Online softmax over the fragments of wgmma: a thread holds two rows of a tile, a quarter of their columns each.
//
// The usual update finds the maximum of every tile before its first exponential. Here p is relative to a softmax_base,
// the maximum of the first tile, and the sum of p, which is needed anyway, tells whether one has grown too large for
// its format. Only then is the softmax_base raised: one that is too low costs no accuracy, as 16-bit numbers are as
// accurate at 2^15 as at 1.
//
// An exponent is the score times the scale less the softmax_base times the scale, and that product, the row's offset,
// is rounded. What it lost is a factor of the whole row and does no harm as long as it is about 1. Beyond kMostRounded
// the softmax_base is a score, the row's exact base, and is subtracted from the scores themselves, which is exact where
// it matters. Such rows have an offset that makes all their p infinite: they are repaired at every tile, and no other
// row pays for them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

#include "cuda/common/row_lse.h"
#include "cuda/hopper/fwd/polynomial_exp2.cuh"
#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda::hopper {

// The one of a thread's two rows that accumulator i belongs to.
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

// Largest sum of p of one thread and tile: fp16 ends at 2^16, bf16 leaves room for large values.
template <typename Element>
constexpr float kMaxTileSum = 0x1p32f;
template <>
constexpr float kMaxTileSum<__half> = 0x1p15f;
template <>
constexpr float kMaxTileSum<float> = 0x1p15f;  // which is multiplied as two of fp16

// The logarithm of the p that a score equal to the softmax_base gets. Two limbs of fp16 hold 22 bits of numbers down to
// 2^-3 and an absolute 2^-25 below that, so that those of fp32 begin higher.
template <typename Element>
constexpr float kBaseLog2OfP = 0;
template <>
constexpr float kBaseLog2OfP<float> = 8;

// The same for an exact base, which no score of its row exceeds. Values of bf16 may be as large as any number of fp32,
// and are added up before the sum is divided by that of p.
template <typename Element>
constexpr float kExactBaseLog2OfP = kBaseLog2OfP<Element>;
template <>
constexpr float kExactBaseLog2OfP<__nv_bfloat16> = -64;

// The softmax_base of a row without a finite score yet: no score is lower, and the first higher one overflows.
constexpr float kNoSoftmaxBase = std::numeric_limits<float>::lowest();

// A softmax_base up to here, in units of log 2, is rounded by 2^-5 at most.
constexpr float kMostRounded = 0x1p20f;

// True if p of accumulator i is computed by polynomial: every kEvery-th (0: none).
template <int kEvery>
__device__ constexpr bool is_polynomial(int i) {
  if constexpr (kEvery > 0) return i % kEvery == kEvery - 1;
  return false;
}

// Bases of the rows of an item, in shared memory, as they are seldom needed. thread_rows: the thread's first one; its
// other one lies 8 rows behind. The four threads of a quad have the same.
struct RowBases {
  float* thread_rows;
  bool has_all;  // whether every row is to have a base

  __device__ float read(int row) const { return thread_rows[8 * row]; }

  __device__ void write(const float (&base)[2]) const {
    __syncwarp();  // what was there has been read
    if (threadIdx.x % 4 == 0) {
      thread_rows[0] = base[0];
      thread_rows[8] = base[1];
    }
    __syncwarp();
  }
};

// The state of a thread's two rows, which may have a scale each. Sums are those of its own columns until finish().
struct OnlineSoftmax {
  float offset[2];  // p = 2^(scale_log2 * score - offset); or kHasBase
  float row_sum[2];
  float tile_sum[2];

  // Takes the softmax_base from an item's first scores, and turns these into p.
  template <typename Element, int kPolynomialEvery, int kCount>
  __device__ void start(float (&scores)[kCount], const float (&scale_log2)[2], const RowBases& bases) {
    SoftmaxBases next;
    next.find<Element>(scores, scale_log2, bases.has_all);
    exponentiate_relative<kPolynomialEvery>(scores, scale_log2, next, bases);
    row_sum[0] = row_sum[1] = 0;
  }

  // Gives rows whose p overflowed the softmax_base of the tile that made them, and takes what was added up before to
  // it: rows of o by the factors. Each row decides by itself, so that none depends on its neighbours. Turns the scores
  // into p.
  template <typename Element, int kPolynomialEvery, int kCount>
  __device__ void raise(float (&scores)[kCount], const float (&scale_log2)[2], float (&factor)[2],
                        const RowBases& bases) {
    SoftmaxBases next;
    next.find<Element>(scores, scale_log2, bases.has_all);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const bool has_base = offset[row] == kHasBase;
      const float base = has_base ? bases.read(row) : 0;
      const float own_offset = has_base ? -kExactBaseLog2OfP<Element> : offset[row];
      const float largest_sum = quad_max(tile_sum[row]);  // of all lanes, whichever of their rows have a base
      const bool grows = has_base ? next.largest[row] > base : largest_sum > kMaxTileSum<Element>;
      const float growth = fmaf(base - next.base[row], scale_log2[row], own_offset - next.offset[row]);
      factor[row] = grows ? ptx::exp2(growth) : 1.f;
      row_sum[row] *= factor[row];
      if (!grows) next.set(row, base, own_offset, has_base);
    }
    exponentiate_relative<kPolynomialEvery>(scores, scale_log2, next, bases);
  }

  // Turns scores into p.
  template <int kPolynomialEvery, int kCount>
  __device__ void exponentiate(float (&scores)[kCount], const float (&scale_log2)[2]) {
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

  // True if a p may have left its format, or a row has a base. NaN, which is both, stays as it is.
  template <typename Element>
  __device__ bool overflows() const {
    return !(tile_sum[0] <= kMaxTileSum<Element>) || !(tile_sum[1] <= kMaxTileSum<Element>);
  }

  // Relative to a softmax_base of its own tile p is 1 at most: a larger sum comes from a score of NaN or infinity in a
  // column of the polynomial's, and is to show.
  template <typename Element>
  __device__ void settle() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (tile_sum[row] > kMaxTileSum<Element>) tile_sum[row] = NAN;
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

  // The log-sum-exp of the finished row.
  template <typename Element>
  __device__ RowLse lse(int row, const RowBases& bases) const {
    if (row_sum[row] == 0) return {0, 0, -INFINITY};
    // The logarithm of a number near 1 is exact to more digits than that of a power of two beside.
    if (offset[row] == kHasBase)
      return {bases.read(row), 0, log2f(row_sum[row] * power_of_2(-kExactBaseLog2OfP<Element>))};
    constexpr float kLog2 = kBaseLog2OfP<Element>;
    return {0, offset[row] + kLog2, log2f(row_sum[row] * power_of_2(-kLog2))};
  }

 private:
  static constexpr float kHasBase = -std::numeric_limits<float>::infinity();

  // Far below the p of any softmax_base.
  static constexpr float kLeastSum = 0x1p-100f;

  // The softmax_base of either row: p = 2^(scale_log2 * (score - base) - offset).
  struct SoftmaxBases {
    float largest[2];  // score of the tile
    float base[2], offset[2];
    bool has_base[2];

    __device__ void set(int row, float new_base, float new_offset, bool is_base) {
      base[row] = new_base;
      offset[row] = new_offset;
      has_base[row] = is_base;
    }

    template <typename Element, int kCount>
    __device__ void find(const float (&scores)[kCount], const float (&scale_log2)[2], bool has_all) {
      float tile_max[2] = {scores[0], scores[2]};
#pragma unroll
      for (int i = 0; i < kCount; ++i) tile_max[row_of(i)] = fmaxf(tile_max[row_of(i)], scores[i]);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        largest[row] = fmaxf(quad_max(tile_max[row]), kNoSoftmaxBase);
        // No product of a score and a scale of 1 at most is lower.
        const bool is_least = largest[row] == kNoSoftmaxBase && scale_log2[row] <= 1;
        const float softmax_base = is_least ? kNoSoftmaxBase : largest[row] * scale_log2[row];
        if (has_all || (!is_least && fabsf(softmax_base) > kMostRounded)) {
          set(row, largest[row], -kExactBaseLog2OfP<Element>, true);
        } else {
          set(row, 0, softmax_base - kBaseLog2OfP<Element>, false);
        }
      }
    }
  };

  template <int kPolynomialEvery, int kCount>
  __device__ void exponentiate_relative(float (&scores)[kCount], const float (&scale_log2)[2], const SoftmaxBases& next,
                                        const RowBases& bases) {
    offset[0] = next.offset[0];
    offset[1] = next.offset[1];
    const bool has_base = __any_sync(0xffffffff, next.has_base[0] || next.has_base[1]);
    if (has_base) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) scores[i] -= next.base[row_of(i)];
    }
    exponentiate<kPolynomialEvery>(scores, scale_log2);
    if (has_base) {
      bases.write(next.base);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (next.has_base[row]) offset[row] = kHasBase;
      }
    }
  }

  __device__ static float power_of_2(float log2) { return __int_as_float((127 + static_cast<int>(log2)) << 23); }
};

}  // namespace mixed_attention::cuda::hopper
