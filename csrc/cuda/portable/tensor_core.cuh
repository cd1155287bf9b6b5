// MMAs of a warp on tiles in shared memory, in each arithmetic.
//
// Tensor cores cut off what falls below an accumulator's precision instead of rounding, always towards zero: a sum of
// thousands loses 1e-5 of its size. MMAs as exact as fp32 (kCutsOffTooMuch) therefore begin a new sum every few steps
// and are added up outside, where additions round.
//
// Infinity has no limbs (kLosesInfinities): what it is multiplied into comes out as NaN, in MMAs of three terms,
// and so does what is multiplied by a number that rounds up to infinity, less than 2^-12 of it from the largest
// there is.
//
// Operands are a: 16 rows, and b: 8 columns, of one depth step of 32 bytes: 16 elements of 16 bits or 8 of 32.
// With g = lane / 4 and t = lane % 4, a thread's accumulators stand at rows g and g + 8, columns 2t and 2t + 1.
#pragma once

#include "cuda/portable/arithmetic.h"
#include "cuda/portable/tile.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"

namespace mixed_attention::cuda::portable {

template <class Element_>
struct Mma16 {
  using Element = Element_;
  static constexpr int kDepth = 16;
  static constexpr bool kCutsOffTooMuch = false, kLosesInfinities = false;

  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };

  __device__ static A make_a(const uint32_t (&x)[4]) { return {{x[0], x[1], x[2], x[3]}}; }
  __device__ static B make_b(uint32_t x0, uint32_t x1) { return {{x0, x1}}; }

  // Depth step k of the scores becomes an operand: their columns are its depth.
  template <int kTiles>
  __device__ static A from_accumulators(const float (&c)[kTiles][4], int k) {
    const auto &low = c[2 * k], &high = c[2 * k + 1];
    return {{ptx::pack<Element>(low[0], low[1]), ptx::pack<Element>(low[2], low[3]),
             ptx::pack<Element>(high[0], high[1]), ptx::pack<Element>(high[2], high[3])}};
  }

  // 16 rows, columns of a tile whose rows are the depth, at depth step k.
  template <class Tile>
  __device__ static A load_a_by_depth(const Tile& tile, int col, int k) {
    A a;
    ptx::ldmatrix_x4_trans(a.x, tile.rowwise(16 * k, col));
    return a;
  }

  // 16 columns out of a tile whose rows are the depth, at depth step k.
  template <class Tile>
  __device__ static void load_b_by_depth(B (&b)[2], const Tile& tile, int col, int k) {
    uint32_t x[4];
    ptx::ldmatrix_x4_trans(x, tile.columnwise(16 * k, col));
    b[0] = {{x[0], x[1]}};
    b[1] = {{x[2], x[3]}};
  }

  __device__ static void multiply_add(float (&c)[4], const A& a, const B& b) {
    ptx::mma_m16n8k16(c, a.x, b.x, Element());
  }
};

// kTerms = 1 rounds operands to TF32. With 3, each is split into a TF32 number and the rest, and of the four MMAs
// only that of the rests, below fp32's precision, is left out.
template <int kTerms>
struct MmaTf32 {
  using Element = float;
  static constexpr int kDepth = 8;
  static constexpr bool kCutsOffTooMuch = kTerms == 3, kLosesInfinities = kTerms == 3;

  template <int kCount>
  struct Operand {
    uint32_t x[kCount];
    uint32_t rest[kTerms == 3 ? kCount : 1];

    __device__ void set(int i, float value) {
      if constexpr (kTerms == 3) {
        ptx::split_tf32(value, x[i], rest[i]);
      } else {
        x[i] = ptx::round_tf32(value);
      }
    }
  };
  using A = Operand<4>;
  using B = Operand<2>;

  __device__ static A make_a(const uint32_t (&x)[4]) {
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.set(i, __uint_as_float(x[i]));
    return a;
  }

  __device__ static B make_b(uint32_t x0, uint32_t x1) {
    B b;
    b.set(0, __uint_as_float(x0));
    b.set(1, __uint_as_float(x1));
    return b;
  }

  // A thread has columns 2t and 2t + 1 of the scores, and the operand wants t and t + 4: the sum over the depth may be
  // taken in any order, so that these are exchanged for those, here and in load_*_by_depth.
  template <int kTiles>
  __device__ static A from_accumulators(const float (&c)[kTiles][4], int k) {
    A a;
    a.set(0, c[k][0]);
    a.set(1, c[k][2]);
    a.set(2, c[k][1]);
    a.set(3, c[k][3]);
    return a;
  }

  template <class Tile>
  __device__ static A load_a_by_depth(const Tile& tile, int col, int k) {
    const int lane = threadIdx.x % 32;
    const float* row = tile.row(8 * k + lane % 4 * 2) + col + lane / 4;
    A a;
    a.set(0, row[0]);
    a.set(1, row[8]);
    a.set(2, row[Tile::kPitch]);
    a.set(3, row[Tile::kPitch + 8]);
    return a;
  }

  template <class Tile>
  __device__ static void load_b_by_depth(B (&b)[2], const Tile& tile, int col, int k) {
    const int lane = threadIdx.x % 32;
    const float* row = tile.row(8 * k + lane % 4 * 2) + col + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[i].set(0, row[8 * i]);
      b[i].set(1, row[8 * i + Tile::kPitch]);
    }
  }

  __device__ static void multiply_add(float (&c)[4], const A& a, const B& b) {
    if constexpr (kTerms == 3) {
      ptx::mma_m16n8k8_tf32(c, a.rest, b.x);
      ptx::mma_m16n8k8_tf32(c, a.x, b.rest);
    }
    ptx::mma_m16n8k8_tf32(c, a.x, b.x);
  }
};

template <Arithmetic>
struct MmaOf;
template <>
struct MmaOf<Arithmetic::kFloat16> : Mma16<__half> {};
template <>
struct MmaOf<Arithmetic::kBFloat16> : Mma16<__nv_bfloat16> {};
template <>
struct MmaOf<Arithmetic::kTf32> : MmaTf32<1> {};
template <>
struct MmaOf<Arithmetic::kTf32x3> : MmaTf32<3> {};

// 16 rows of a tile whose columns are the depth.
template <class Mma, class Tile>
__device__ typename Mma::A load_a(const Tile& tile, int row, int k) {
  uint32_t x[4];
  ptx::ldmatrix_x4(x, tile.columnwise(row, k * Mma::kDepth));
  return Mma::make_a(x);
}

// 16 columns of the result out of as many rows of a tile whose columns are the depth.
template <class Mma, class Tile>
__device__ void load_b(typename Mma::B (&b)[2], const Tile& tile, int row, int k) {
  uint32_t x[4];
  ptx::ldmatrix_x4(x, tile.rowwise(row, k * Mma::kDepth));
  b[0] = Mma::make_b(x[0], x[1]);
  b[1] = Mma::make_b(x[2], x[3]);
}

// Takes up a sum where it stands, or begins a new one that `finish_sum` adds to it.
template <bool kIsNew, int kTilesM, int kTilesN, int kAllTiles>
__device__ void begin_sum(float (&sum)[kTilesM][kTilesN][4], const float (&c)[kTilesM][kAllTiles][4], int first) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][n][e] = kIsNew ? 0 : c[m][first + n][e];
    }
  }
}

template <bool kIsNew, int kTilesM, int kTilesN, int kAllTiles>
__device__ void finish_sum(const float (&sum)[kTilesM][kTilesN][4], float (&c)[kTilesM][kAllTiles][4], int first) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][first + n][e] = kIsNew ? c[m][first + n][e] + sum[m][n][e] : sum[m][n][e];
    }
  }
}

// c += a · bᵀ: rows of tile a from a_row on against rows of tile b from b_row on, over their columns.
template <class Mma, int kTilesM, int kTilesN, class TileA, class TileB>
__device__ void multiply_rows(float (&c)[kTilesM][kTilesN][4], const TileA& a, int a_row, const TileB& b,
                              int b_row = 0) {
  constexpr int kSteps = TileB::kCols / Mma::kDepth;
  constexpr bool kIsNew = Mma::kCutsOffTooMuch && kSteps > 8;
  // A sum has 16 columns: so the backward agrees on scores with a forward that does not cut off, or cuts off elsewhere.
  constexpr int kStepsAtOnce = kIsNew ? 2 : kSteps;
#pragma unroll
  for (int first = 0; first < kSteps; first += kStepsAtOnce) {
    float sum[kTilesM][kTilesN][4];
    begin_sum<kIsNew>(sum, c, 0);
#pragma unroll
    for (int k = first; k < min(first + kStepsAtOnce, kSteps); ++k) {
      typename Mma::A fragment_a[kTilesM];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) fragment_a[m] = load_a<Mma>(a, a_row + 16 * m, k);
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        typename Mma::B fragment_b[2];
        load_b<Mma>(fragment_b, b, b_row + 8 * n, k);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          Mma::multiply_add(sum[m][n], fragment_a[m], fragment_b[0]);
          Mma::multiply_add(sum[m][n + 1], fragment_a[m], fragment_b[1]);
        }
      }
    }
    finish_sum<kIsNew>(sum, c, 0);
  }
}

// c += p · b: scores in registers against a tile whose rows from b_row on are the scores' columns. prepare(first) makes
// tiles of p ready, from the first of a depth step on, ahead of the step's MMAs.
template <class Mma, int kTilesM, int kTilesN, int kTilesP, class Tile, class Prepare>
__device__ void multiply_scores(float (&c)[kTilesM][kTilesN][4], const float (&p)[kTilesM][kTilesP][4], const Tile& b,
                                int b_row, const Prepare& prepare) {
  static_assert(kTilesN * 8 == Tile::kCols, "the sums have the columns of the tile");
  constexpr bool kIsNew = Mma::kCutsOffTooMuch;
  // Enough MMAs that do not wait for each other, and few enough registers.
  constexpr int kTilesAtOnce = !kIsNew ? kTilesN : kTilesN > 16 ? 2 : 4, kSteps = kTilesP * 8 / Mma::kDepth;
  typename Mma::A fragment_a[kSteps][kTilesM];
#pragma unroll
  for (int first = 0; first < kTilesN; first += kTilesAtOnce) {
    float sum[kTilesM][kTilesAtOnce][4];
    begin_sum<kIsNew>(sum, c, first);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (first == 0) {
        prepare(kTilesP / kSteps * k);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) fragment_a[k][m] = Mma::from_accumulators(p[m], k);
      }
#pragma unroll
      for (int n = 0; n < kTilesAtOnce; n += 2) {
        typename Mma::B fragment_b[2];
        Mma::load_b_by_depth(fragment_b, b, 8 * (first + n), b_row / Mma::kDepth + k);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          Mma::multiply_add(sum[m][n], fragment_a[k][m], fragment_b[0]);
          Mma::multiply_add(sum[m][n + 1], fragment_a[k][m], fragment_b[1]);
        }
      }
    }
    finish_sum<kIsNew>(sum, c, first);
  }
}

template <class Mma, int kTilesM, int kTilesN, int kTilesP, class Tile>
__device__ void multiply_scores(float (&c)[kTilesM][kTilesN][4], const float (&p)[kTilesM][kTilesP][4], const Tile& b,
                                int b_row = 0) {
  multiply_scores<Mma>(c, p, b, b_row, [](int) {});
}

// c += a · b: operands load(m, k) of tile row m and depth step k against columns of tile b from b_col on, over b's
// rows.
template <class Mma, int kTilesM, int kTilesN, class Load, class Tile>
__device__ void multiply_columns(float (&c)[kTilesM][kTilesN][4], const Load& load, const Tile& b, int b_col) {
#pragma unroll
  for (int k = 0; k < Tile::kRows / Mma::kDepth; ++k) {
    typename Mma::A fragment_a[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) fragment_a[m] = load(m, k);
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      typename Mma::B fragment_b[2];
      Mma::load_b_by_depth(fragment_b, b, b_col + 8 * n, k);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        Mma::multiply_add(c[m][n], fragment_a[m], fragment_b[0]);
        Mma::multiply_add(c[m][n + 1], fragment_a[m], fragment_b[1]);
      }
    }
  }
}

// Writes a warp's accumulators to a tile, rounded to its elements, the first at `row` and `col`.
template <int kTilesM, int kTilesN, class Element, int kRows, int kCols>
__device__ void put_accumulators(SharedTile<Element, kRows, kCols>& tile, int row, int col,
                                 const float (&c)[kTilesM][kTilesN][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Element* target = tile.row(row + 16 * m + 8 * half + lane / 4) + col + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) put_pair(target + 8 * n, c[m][n][2 * half], c[m][n][2 * half + 1]);
    }
  }
}

// Writes a warp's accumulators to the first num_rows rows of a dense matrix of num_cols columns, from first_col on.
template <int kTilesM, int kTilesN>
__device__ void store_fp32(float* matrix, int64_t num_cols, int num_rows, int first_col,
                           const float (&c)[kTilesM][kTilesN][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int row = 8 * i + lane / 4;
    if (row >= num_rows) continue;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = first_col + 8 * n + lane % 4 * 2 + e;
        if (col < num_cols) matrix[row * num_cols + col] = c[i / 2][n][i % 2 * 2 + e];
      }
    }
  }
}

}  // namespace mixed_attention::cuda::portable
