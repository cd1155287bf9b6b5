// Products of packed tiles: C (rows, columns) from A (rows, depth) and B (depth, columns), the depth in factors.
//
// A block of kRowBlock rows by up to kBlockVectors vectors of columns stays in registers; factors of A are broadcast,
// so A may be read along either of its axes, and only B and C need contiguous rows. (In tile registers: tiles.h.)
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/factors.h"
#include "cpu/simd/tiles.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

// 6 x 4 accumulators where there are 32 registers, 6 x 2 where there are 16.
inline constexpr int kBlockVectors = MIXED_ATTENTION_VECTOR_REGISTERS >= 32 ? 4 : 2;

enum class Update { kSet, kAdd };

template <class F>
struct Operand {
  const F* data;
  int64_t row_stride, column_stride;
};

template <class F, int kVectors, Update kUpdate>
[[gnu::noinline]] void gemm_block(Operand<F> a, const F* b, int64_t b_stride, SumOf<F>* c, int64_t c_stride,
                                  int64_t depth) {
  using Sum = SumOf<F>;
  constexpr int kRows = kRowBlock<F>;
  Vec<Sum> acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) acc[row][i] = Vec<Sum>{};
  }
  const F* a_column = a.data;
  for (int64_t k = 0; k < depth; ++k, a_column += a.column_stride, b += b_stride) {
    FactorVec<F> b_row[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) b_row[i] = load_factors(b + i * kLanes<Sum>);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const auto a_factor = broadcast_factor(a_column[row * a.row_stride]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) acc[row][i] = multiply_add(a_factor, b_row[i], acc[row][i]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      Sum* sum = c + row * c_stride + i * kLanes<Sum>;
      // Added only now: a long sum made of short ones loses far less to rounding than one grown term by term.
      store(sum, kUpdate == Update::kAdd ? load(sum) + acc[row][i] : acc[row][i]);
    }
  }
}

// rows is a multiple of kRowBlock, columns of the vector width. (In tiles all are multiples of 16, and A is read along
// its depth.)
template <Update kUpdate, class F>
void gemm(int64_t rows, int64_t columns, int64_t depth, Operand<F> a, const F* b, int64_t b_stride, SumOf<F>* c,
          int64_t c_stride) {
  if constexpr (kIsTiled<F>) {
    tiled_gemm<kUpdate == Update::kAdd>(rows, columns, depth, a.data, a.row_stride, b, b_stride, c, c_stride);
  } else {
    constexpr int64_t kLane = kLanes<SumOf<F>>;
    constexpr int kThree = kBlockVectors < 3 ? kBlockVectors : 3;
    // A block of columns of B stays in L1 while all rows pass.
    for (int64_t column = 0; column < columns; column += kBlockVectors * kLane) {
      const int64_t vectors = (columns - column) / kLane;
      const auto block = vectors >= 4   ? gemm_block<F, kBlockVectors, kUpdate>
                         : vectors == 3 ? gemm_block<F, kThree, kUpdate>
                         : vectors == 2 ? gemm_block<F, 2, kUpdate>
                                        : gemm_block<F, 1, kUpdate>;
      for (int64_t row = 0; row < rows; row += kRowBlock<F>) {
        const Operand<F> a_rows{a.data + row * a.row_stride, a.row_stride, a.column_stride};
        block(a_rows, b + column, b_stride, c + row * c_stride + column, c_stride, depth);
      }
    }
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
