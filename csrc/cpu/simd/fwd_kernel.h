// Forward: one tile of query rows against all keys of its segment, by online softmax.
//
// Scores are kept in base 2: q is packed times softmax_scale * log2(e), so that p = exp2(s - running maximum).
#pragma once

#include <cmath>

#include "cpu/simd/dropout.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/keys.h"
#include "cpu/simd/scratch.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

inline constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class Element>
class FwdTile {
  using Acc = Accumulator<Element>;
  using V = Vec<Acc>;
  static constexpr int kLane = kLanes<Acc>;

 public:
  FwdTile(const FwdParams& p, const FwdTask& task, void* memory)
      : p_(p),
        task_(task),
        rows_(task.rows.end - task.rows.begin),
        padded_rows_(round_up(rows_, kRowBlock)),
        width_v_(round_up(p.head_dim_v, kLane)),
        dropout_(p) {
    Scratch scratch(memory);
    q_ = scratch.take<Acc>(kFwdBlockM * p.head_dim);
    out_ = scratch.take<Acc>(kFwdBlockM * width_v_);
    max_ = scratch.take<Acc>(kFwdBlockM);
    sum_ = scratch.take<Acc>(kFwdBlockM * kLane);
    k_transposed_ = scratch.take<Acc>(p.head_dim * kFwdBlockN);
    v_ = scratch.take<Acc>(kFwdBlockN * width_v_);
    s_ = scratch.take<Acc>(kRowBlock * kFwdBlockN);
    kept_ = scratch.take<Acc>(kFwdBlockN);
    keys_ = scratch.take<Key>(kFwdBlockN);
  }

  void run() {
    load_queries();
    KeyCursor cursor(task_.keys, task_.num_key_ranges, mask_of(p_, task_.batch));
    while (const int64_t count = cursor.next(keys_, kFwdBlockN)) {
      load_keys(count);
      for (int64_t row = 0; row < padded_rows_; row += kRowBlock) attend(row, count);
    }
    store_rows();
  }

 private:
  void load_queries() {
    const Element* q = static_cast<const Element*>(p_.q) + task_.batch * p_.q_strides.batch +
                       task_.head * p_.q_strides.head + task_.rows.begin * p_.q_strides.row;
    const Acc scale = static_cast<Acc>(p_.softmax_scale * kLog2E);
    for (int64_t row = 0; row < rows_; ++row) {
      load_row(q + row * p_.q_strides.row, p_.head_dim, scale, q_ + row * p_.head_dim);
    }
    for (int64_t i = rows_ * p_.head_dim; i < padded_rows_ * p_.head_dim; ++i) q_[i] = 0;
    for (int64_t i = 0; i < padded_rows_ * width_v_; ++i) out_[i] = 0;
    for (int64_t i = 0; i < padded_rows_; ++i) max_[i] = -static_cast<Acc>(INFINITY);
    for (int64_t i = 0; i < padded_rows_ * kLane; ++i) sum_[i] = 0;
  }

  void load_keys(int64_t count) {
    const Element* k =
        static_cast<const Element*>(p_.k) + task_.batch * p_.k_strides.batch + task_.head * p_.k_strides.head;
    const Element* v =
        static_cast<const Element*>(p_.v) + task_.batch * p_.v_strides.batch + task_.head * p_.v_strides.head;
    pack_transposed(k, p_.k_strides.row, keys_, count, p_.head_dim, k_transposed_, kFwdBlockN);
    pack_rows(v, p_.v_strides.row, keys_, count, p_.head_dim_v, v_, width_v_);
  }

  // kRowBlock rows from `first` on against the keys of the tile.
  void attend(int64_t first, int64_t count) {
    const int64_t columns = round_up(count, kLane);
    gemm<Update::kSet>(kRowBlock, columns, p_.head_dim, Operand<Acc>{q_ + first * p_.head_dim, p_.head_dim, 1},
                       k_transposed_, kFwdBlockN, s_, kFwdBlockN);
    for (int64_t i = 0; i < kRowBlock; ++i) softmax(first + i, s_ + i * kFwdBlockN, count, columns);
    gemm<Update::kAdd>(kRowBlock, width_v_, count, Operand<Acc>{s_, kFwdBlockN, 1}, v_, width_v_,
                       out_ + first * width_v_, width_v_);
  }

  // Turns a row of scores into weights relative to the running maximum, and what was summed so far with it.
  void softmax(int64_t row, Acc* s, int64_t count, int64_t columns) {
    for (int64_t i = count; i < columns; ++i) s[i] = -static_cast<Acc>(INFINITY);
    V tile_max = load(s);
    for (int64_t i = kLane; i < columns; i += kLane) tile_max = max<Acc>(load(s + i), tile_max);
    const Acc old_max = max_[row];
    const Acc tile_top = reduce_max<Acc>(tile_max);
    const Acc new_max = tile_top > old_max ? tile_top : old_max;
    if (new_max != old_max) rescale(row, old_max, new_max);
    V sum = load(sum_ + row * kLane);
    for (int64_t i = 0; i < columns; i += kLane) {
      const V p = exp2_nonpositive<Acc>(load(s + i) - new_max);
      sum += p;
      store(s + i, p);
    }
    store(sum_ + row * kLane, sum);
    if (p_.dropout_p > 0) {
      dropout_.weights(task_.rows.begin + row, task_.batch * p_.num_heads + task_.head, keys_, count, kept_);
      for (int64_t i = 0; i < count; ++i) s[i] *= kept_[i];
    }
  }

  void rescale(int64_t row, Acc old_max, Acc new_max) {
    max_[row] = new_max;
    const V factor = exp2_nonpositive<Acc>(broadcast(old_max - new_max));
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
      lse[row] = has_keys ? static_cast<Acc>((max_[row] + std::log2(sum)) * kLn2) : -static_cast<Acc>(INFINITY);
    }
  }

  const FwdParams& p_;
  const FwdTask& task_;
  const int64_t rows_, padded_rows_, width_v_;
  const Dropout dropout_;
  Acc* q_;             // [rows][head_dim], times softmax_scale * log2(e)
  Acc* out_;           // [rows][width_v], not yet divided by the sum
  Acc* max_;           // [rows]
  Acc* sum_;           // [rows][lanes]
  Acc* k_transposed_;  // [head_dim][kFwdBlockN]
  Acc* v_;             // [kFwdBlockN][width_v]
  Acc* s_;             // [kRowBlock][kFwdBlockN], scores, then weights
  Acc* kept_;          // [kFwdBlockN], dropout's factors
  Key* keys_;          // [kFwdBlockN]
};

template <class Element>
void fwd(const FwdParams& params, const FwdTask& task, void* scratch) {
  FwdTile<Element>(params, task, scratch).run();
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
