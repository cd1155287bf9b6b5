// dk or dv of a tile of keys: weights, transposed, times rows of q or dout, summed over tiles of queries.
//
// Vectors broadcast the weights, which lie one way or the other. Tile registers take A only with its depth along the
// rows: there the rows of q or dout are packed as columns and stand on the left, the weights as they are on the right,
// and the sums are transposed, (channels, keys), until they are stored.
#pragma once

#include "cpu/simd/gemm.h"
#include "cpu/simd/scratch.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

template <class Element>
class KeySums {
  using F = Factor<Element>;
  using Acc = Accumulator<Element>;
  static constexpr int kLane = kLanes<Acc>;

 public:
  KeySums(int64_t size, Scratch& scratch) : size_(size), width_(round_up(size, kLane)) {
    rows_ = scratch.take<F>(num_factors<F>(kBwdBlockM) * width_);
    sums_ = scratch.take<Acc>(kBwdBlockN * width_);
  }

  void clear() {
    for (int64_t i = 0; i < kBwdBlockN * width_; ++i) sums_[i] = 0;
  }

  // Packs so many rows of q or dout.
  template <class RowAt>
  void pack(int64_t count, RowAt row_at) {
    if constexpr (kIsTiled<F>) {
      pack_rows_as_columns(count, size_, row_at, rows_, width_, num_factors<F>(kBwdBlockM));
    } else {
      pack_rows<Element>(count, size_, row_at, rows_, width_);
    }
  }

  template <class Weights>
  void add(const Weights& weights, int64_t num_rows, int64_t num_keys) {
    const int64_t depth = depth_of<F>(num_rows);
    if constexpr (kIsTiled<F>) {
      gemm<Update::kAdd>(width_, round_up(num_keys, kLane), depth, Operand<F>{rows_, num_factors<F>(kBwdBlockM), 1},
                         weights.across_rows(), kBwdBlockN, sums_, kBwdBlockN);
    } else {
      gemm<Update::kAdd>(round_up(num_keys, kRowBlock<F>), width_, depth, weights.transposed(), rows_, width_, sums_,
                         width_);
    }
  }

  // The sums of so many keys, times scale, to the rows of out.
  template <class RowAt>
  void write(int64_t count, Acc scale, RowAt out) const {
    if constexpr (!kIsTiled<F>) {
      for (int64_t i = 0; i < count; ++i) store_row(sums_ + i * width_, size_, scale, out(i));
    } else {
      for (int64_t i = 0; i < count; i += kLane) {
        for (int64_t d = 0; d < size_; d += kLane) {
          Vec<Acc> square[kLane];
          for (int j = 0; j < kLane; ++j) square[j] = load(sums_ + (d + j) * kBwdBlockN + i);
          transpose(square);
          const int64_t width = size_ - d < kLane ? size_ - d : kLane;
          for (int64_t j = 0; j < kLane && i + j < count; ++j) {
            store_row(reinterpret_cast<const Acc*>(&square[j]), width, scale, out(i + j) + d);
          }
        }
      }
    }
  }

 private:
  const int64_t size_, width_;
  F* rows_;    // [rows / kTerms][width], in tiles [width][kBwdBlockM / kTerms]
  Acc* sums_;  // [kBwdBlockN][width], in tiles [width][kBwdBlockN]
};

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
