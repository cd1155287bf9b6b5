// Weights, or ds, of a tile of queries and keys, in the forms that the products of the backward read.
#pragma once

#include "cpu/simd/gemm.h"
#include "cpu/simd/scratch.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

// Weights of rows and columns (kBwdBlockM, kBwdBlockN) that products read along either axis. Where a factor has two
// terms these are two tiles, as neighbours along one axis are none along the other.
template <class F, bool kReadAlongRows>
class WeightTile {
  using V = Vec<SumOf<F>>;
  static constexpr bool kHasPairs = kTerms<F> == 2;

 public:
  WeightTile() = default;
  explicit WeightTile(Scratch& scratch) {
    across_rows_ = scratch.take<F>(num_factors<F>(kBwdBlockM * kBwdBlockN));
    if constexpr (kHasPairs && kReadAlongRows) along_rows_ = scratch.take<F>(num_factors<F>(kBwdBlockM * kBwdBlockN));
  }

  // Vectors at two neighbouring rows and two neighbouring vectors of columns; row and column are even.
  void put(int64_t row, int64_t column, const V (&values)[2][2]) {
    constexpr int kLane = kLanes<SumOf<F>>;
    for (int i = 0; i < 2; ++i) {
      if constexpr (kHasPairs) {
        store_zipped(across_rows_ + row / 2 * kBwdBlockN + column + i * kLane, values[0][i], values[1][i]);
        if constexpr (kReadAlongRows) {
          store_two(along_rows_ + ((row + i) * kBwdBlockN + column) / 2, values[i][0], values[i][1]);
        }
      } else {
        store_two(across_rows_ + (row + i) * kBwdBlockN + column, values[i][0], values[i][1]);
      }
    }
  }

  // Zeros from a column on, as far as products read.
  void clear_columns(int64_t begin, int64_t rows) {
    for (int64_t row = 0; row < num_factors<F>(rows) && !kIsTiled<F>; ++row) {
      for (int64_t i = begin; i < round_up(begin, kRowBlock<F>); ++i) across_rows_[row * kBwdBlockN + i] = F{};
    }
    if constexpr (kHasPairs && kReadAlongRows) {
      for (int64_t row = 0; row < rows; ++row) {
        F* pairs = along_rows_ + row * kBwdBlockN / 2;
        if (begin % 2) pairs[begin / 2].bits &= 0xFFFF;
        for (int64_t i = num_factors<F>(begin); i < depth_of<F>(begin); ++i) pairs[i] = F{};
      }
    }
  }

  // (rows, columns) as B, the depth being the rows.
  const F* across_rows() const { return across_rows_; }
  // (columns, rows), likewise.
  Operand<F> transposed() const { return {across_rows_, 1, kBwdBlockN}; }
  // (rows, columns), the depth being the columns.
  Operand<F> along_rows() const {
    if constexpr (kHasPairs) {
      return {along_rows_, kBwdBlockN / 2, 1};
    } else {
      return {across_rows_, kBwdBlockN, 1};
    }
  }

 private:
  F* across_rows_ = nullptr;  // [kBwdBlockM / kTerms][kBwdBlockN]
  F* along_rows_ = nullptr;   // [kBwdBlockM][kBwdBlockN / kTerms]
};

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
