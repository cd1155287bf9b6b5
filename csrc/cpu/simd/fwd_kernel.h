// Forward: one tile of query rows against all keys of its segment, by online softmax.
//
// Scores are scaled to base 2 where they are read, so that p = exp2(scale * s - base): 16-bit queries are
// multiplied as they are.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/simd/dropout.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/keys.h"
#include "cpu/simd/scratch.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

inline constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// The sign of the softmax scale, which q is packed with, so that the greatest score is the greatest after scaling too.
template <class Acc>
Acc scale_sign(double softmax_scale) {
  return softmax_scale < 0 ? Acc(-1) : Acc(1);
}

// The scale without its sign, to base 2. Never 0: the scores of columns without a key are -inf and have to stay so.
template <class Acc>
Acc scale_log2(double softmax_scale) {
  const Acc scale = static_cast<Acc>(std::abs(softmax_scale) * kLog2E);
  return scale < std::numeric_limits<Acc>::min() ? std::numeric_limits<Acc>::min() : scale;
}

template <class Element>
class FwdTile {
  using F = Factor<Element>;
  using Acc = Accumulator<Element>;
  using V = Vec<Acc>;
  static constexpr int kLane = kLanes<Acc>;
  static constexpr int64_t kRows = kRowBlock<F>;  // whose scores are made at a time
  // How far above the base a score may come before the base is raised to it: weights up to 2^8 are as exact as up to 1,
  // and after its first tile a row hardly ever has to rescale.
  static constexpr Acc kHeadroom = 8;

 public:
  FwdTile(const FwdParams& p, const FwdTask& task, void* memory)
      : p_(p),
        task_(task),
        rows_(task.rows.end - task.rows.begin),
        padded_rows_(round_up(rows_, kRows)),
        depth_(depth_of<F>(p.head_dim)),
        width_v_(round_up(p.head_dim_v, kLane)),
        scale_log2_(scale_log2<Acc>(p.softmax_scale)),
        dropout_(p) {
    Scratch scratch(memory);
    q_ = scratch.take<F>(padded_rows_ * depth_);
    out_ = scratch.take<Acc>(padded_rows_ * width_v_);
    base_ = scratch.take<Acc>(padded_rows_);
    sum_ = scratch.take<Acc>(padded_rows_ * kLane);
    k_transposed_ = scratch.take<F>(depth_ * kFwdBlockN);
    v_ = scratch.take<F>(num_factors<F>(kFwdBlockN) * width_v_);
    s_ = scratch.take<Acc>(kRows * kFwdBlockN);
    p_tile_ = weights_of(s_, scratch);
    kept_ = scratch.take<Acc>(kFwdBlockN);
    keys_ = scratch.take<Key>(kFwdBlockN);
  }

  void run() {
    load_queries();
    KeyCursor cursor(task_.keys, task_.num_key_ranges, mask_of(p_, task_.batch));
    while (const int64_t count = cursor.next(keys_, kFwdBlockN)) {
      load_keys(count);
      for (int64_t row = 0; row < padded_rows_; row += kRows) attend(row, count);
    }
    store_rows();
  }

 private:
  void load_queries() {
    const Element* q = static_cast<const Element*>(p_.q) + task_.batch * p_.q_strides.batch +
                       task_.head * p_.q_strides.head + task_.rows.begin * p_.q_strides.row;
    const Acc sign = scale_sign<Acc>(p_.softmax_scale);
    for (int64_t row = 0; row < padded_rows_; ++row) {
      pack_row(row < rows_ ? q + row * p_.q_strides.row : nullptr, p_.head_dim, sign, q_ + row * depth_, depth_);
    }
    for (int64_t i = 0; i < padded_rows_ * width_v_; ++i) out_[i] = 0;
    for (int64_t i = 0; i < padded_rows_; ++i) base_[i] = -static_cast<Acc>(INFINITY);
    for (int64_t i = 0; i < padded_rows_ * kLane; ++i) sum_[i] = 0;
  }

  void load_keys(int64_t count) {
    const Element* k =
        static_cast<const Element*>(p_.k) + task_.batch * p_.k_strides.batch + task_.head * p_.k_strides.head;
    const Element* v =
        static_cast<const Element*>(p_.v) + task_.batch * p_.v_strides.batch + task_.head * p_.v_strides.head;
    pack_columns<Element>(count, p_.head_dim, KeyRows{k, p_.k_strides.row, keys_, count}, k_transposed_,
                          columns_of(count), kFwdBlockN);
    pack_rows<Element>(depth_of<F>(count) * kTerms<F>, p_.head_dim_v, Acc(1),
                       KeyRows{v, p_.v_strides.row, keys_, count}, v_, width_v_);
  }

  // Of so many keys.
  static int64_t columns_of(int64_t count) { return round_up(count, 2 * kLane); }

  // kRows rows from `first` on against the keys of the tile.
  void attend(int64_t first, int64_t count) {
    const int64_t columns = columns_of(count);
    gemm<Update::kSet>(kRows, columns, depth_, Operand<F>{q_ + first * depth_, depth_, 1}, k_transposed_, kFwdBlockN,
                       s_, kFwdBlockN);
    for (int64_t i = 0; i < kRows; ++i) {
      Acc* s = s_ + i * kFwdBlockN;
      F* p = p_tile_ + i * kFwdBlockN / kTerms<F>;
      p_.dropout_p > 0 ? softmax<true>(first + i, s, count, columns, p)
                       : softmax<false>(first + i, s, count, columns, p);
    }
    gemm<Update::kAdd>(kRows, width_v_, depth_of<F>(count), Operand<F>{p_tile_, kFwdBlockN / kTerms<F>, 1}, v_,
                       width_v_, out_ + first * width_v_, width_v_);
  }

  // Where weights become factors: in their place, unless factors are of another type.
  static F* weights_of(Acc* s, Scratch& scratch) {
    if constexpr (std::is_same_v<F, Acc>) {
      return s;
    } else {
      return scratch.take<F>(num_factors<F>(kRows * kFwdBlockN));
    }
  }

  // Turns a row of scores into weights relative to the row's base, and what was summed so far with it.
  template <bool kDropout>
  void softmax(int64_t row, Acc* s, int64_t count, int64_t columns, F* p) {
    for (int64_t i = count; i < columns; ++i) s[i] = -static_cast<Acc>(INFINITY);
    V tile_max = load(s);
    for (int64_t i = kLane; i < columns; i += kLane) tile_max = max<Acc>(load(s + i), tile_max);
    if (any_above<Acc>(scale_log2_ * tile_max, base_[row] + kHeadroom)) raise_base(row, tile_max);
    if constexpr (kDropout) draw_dropout(row, count, columns);
    const Acc base = base_[row];
    V sum = load(sum_ + row * kLane);
    for (int64_t i = 0; i < columns; i += 2 * kLane) {
      V first = exp2<Acc>(scale_log2_ * load(s + i) - base);
      V second = exp2<Acc>(scale_log2_ * load(s + i + kLane) - base);
      sum += first + second;
      if constexpr (kDropout) {
        first *= load(kept_ + i);
        second *= load(kept_ + i + kLane);
      }
      store_two(p + i / kTerms<F>, first, second);
    }
    store(sum_ + row * kLane, sum);
  }

  void draw_dropout(int64_t row, int64_t count, int64_t columns) {
    dropout_.weights(task_.rows.begin + row, task_.batch * p_.num_heads + task_.head, keys_, count, kept_);
    for (int64_t i = count; i < columns; ++i) kept_[i] = 0;
  }

  void raise_base(int64_t row, V tile_max) {
    const Acc old_base = base_[row];
    base_[row] = scale_log2_ * reduce_max<Acc>(tile_max);
    const V factor = exp2<Acc>(broadcast(old_base - base_[row]));
    store(sum_ + row * kLane, load(sum_ + row * kLane) * factor);
    Acc* out = out_ + row * width_v_;
    for (int64_t i = 0; i < width_v_; i += kLane) store(out + i, load(out + i) * factor);
  }

  void store_rows() {
    Element* out = static_cast<Element*>(p_.out) + task_.batch * p_.out_strides.batch +
                   task_.head * p_.out_strides.head + task_.rows.begin * p_.out_strides.row;
    Acc* lse = static_cast<Acc*>(p_.lse) + (task_.batch * p_.num_heads + task_.head) * p_.seqlen_q + task_.rows.begin;
    for (int64_t row = 0; row < rows_; ++row) {
      const Acc sum = reduce_sum<Acc>(load(sum_ + row * kLane));
      const bool has_keys = sum != 0;
      store_row(out_ + row * width_v_, p_.head_dim_v, has_keys ? 1 / sum : Acc(0), out + row * p_.out_strides.row);
      lse[row] = has_keys ? static_cast<Acc>((base_[row] + std::log2(sum)) * kLn2) : -static_cast<Acc>(INFINITY);
    }
  }

  const FwdParams& p_;
  const FwdTask& task_;
  const int64_t rows_, padded_rows_, depth_, width_v_;
  const Acc scale_log2_;
  const Dropout dropout_;
  F* q_;             // [rows][depth], with the sign of the softmax scale
  Acc* out_;         // [rows][width_v], not yet divided by the sum
  Acc* base_;        // [rows], what the exponents of weights are relative to
  Acc* sum_;         // [rows][lanes]
  F* k_transposed_;  // [depth][kFwdBlockN]
  F* v_;             // [kFwdBlockN / kTerms][width_v]
  Acc* s_;           // [kRows][kFwdBlockN], scores, then weights
  F* p_tile_;        // [kRows][kFwdBlockN / kTerms], weights
  Acc* kept_;        // [kFwdBlockN], dropout's factors
  Key* keys_;        // [kFwdBlockN]
};

template <class Element>
void fwd(const FwdParams& params, const FwdTask& task, void* scratch) {
  [[maybe_unused]] const TileRegistersFor<Factor<Element>> registers;
  FwdTile<Element>(params, task, scratch).run();
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
