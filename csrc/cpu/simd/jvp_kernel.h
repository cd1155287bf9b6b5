// How out and log-sum-exp move with q, k and v: the forward's tile, and beside it sums of tangents for each direction.
//
// For a row, with s' the tangents of its scores and any number c,
//
//   h = p (s' - c)     r = sum of h     a = sum of (h v + p v')     lse' = r / l + c     out' = a / l - (r / l) out
//
// with l the sum of p. c is the mean of s' so far, taken anew whenever m is raised: so a part that all s' of a row
// share does not cancel in rounded sums. Where log-sum-exps are known, p comes from them, and nothing is rescaled.
#pragma once

#include "cpu/simd/fwd_kernel.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

template <class Element>
class JvpTile : FwdTile<Element> {
  using Base = FwdTile<Element>;
  using Base::depth_;
  using Base::item_;
  using Base::keys_;
  using Base::kLane;
  using Base::kRows;
  using Base::max_;
  using Base::out_;
  using Base::padded_rows_;
  using Base::rows_;
  using Base::sum_;
  using Base::width_v_;
  using typename Base::Acc;
  using typename Base::F;
  using typename Base::V;

 public:
  // measured: of rows whose log-sum-exp is known and large; null where there are none.
  JvpTile(const JvpParams& p, const FwdItem& item, RowSums<const Accumulator<Element>> measured, void* memory)
      : JvpTile(p, item, measured, Scratch(memory)) {}

  void run() {
    Base::load_queries();
    load_query_tangents();
    if (p_.lse_is_known) {
      load_rows();
      walk<true>();
      store_tangents();
      return;
    }
    walk<false>();
    const bool has_overflown = Base::store_rows(p_);
    if (!store_tangents() && !has_overflown) return;
    // As in the forward: what has overflown is made once more, of weights that are small throughout.
    Base::lift_ = Base::kLift;
    walk<false>();
    Base::store_rows(p_);
    store_tangents();
  }

 private:
  JvpTile(const JvpParams& p, const FwdItem& item, RowSums<const Acc> measured, Scratch&& scratch)
      : Base(p, item, static_cast<Scratch&&>(scratch)),
        p_(p),
        tangents_(p.tangents),
        measured_(measured),
        tangent_scale_(static_cast<Acc>(Base::scale_.log2 * kLn2)) {
    const int64_t count = tangents_.count;
    if (tangents_.q) q_dot_ = scratch.take<F>(count * padded_rows_ * depth_);
    if (tangents_.k) k_dot_transposed_ = scratch.take<F>(count * depth_ * kFwdBlockN);
    if (tangents_.v) v_dot_ = scratch.take<F>(count * num_factors<F>(kFwdBlockN) * width_v_);
    out_dot_ = scratch.take<Acc>(count * padded_rows_ * width_v_);
    mean_ = scratch.take<Acc>(count * padded_rows_);
    sum_dot_ = scratch.take<Acc>(count * padded_rows_ * kLane);
    lse_log2_ = scratch.take<Acc>(padded_rows_);
    mass_before_ = scratch.take<Acc>(kRows);
    s_dot_ = scratch.take<Acc>(kRows * kFwdBlockN);
    h_tile_ = Base::weights_of(s_dot_, scratch);
    kept_rows_ = scratch.take<Acc>(kRows * kFwdBlockN);
    // Tangents want weights as they are before dropout, where the scores were.
    if (kTerms<F> == 1 && p.dropout_p > 0) Base::p_tile_ = scratch.take<F>(kRows * kFwdBlockN);
  }

  // Direction t of a tensor, for the item's batch and head.
  const Element* at(const void* base, int64_t step, int t, const Strides& strides) const {
    return static_cast<const Element*>(base) + t * step + item_.batch * strides.batch + item_.head * strides.head;
  }

  void load_query_tangents() {
    for (int t = 0; t < tangents_.count && tangents_.q; ++t) {
      const Element* q = at(tangents_.q, tangents_.q_step, t, tangents_.q_strides);
      for (int64_t row = 0; row < padded_rows_; ++row) {
        pack_row(row < rows_ ? q + (item_.rows.begin + row) * tangents_.q_strides.row : nullptr, p_.head_dim,
                 q_dot_ + (t * padded_rows_ + row) * depth_, depth_, Base::scale_.query);
      }
    }
  }

  // What weights are relative to after a forward. Rows without keys have weights of 0.
  void load_rows() {
    const int64_t first = first_row();
    const Acc* lse = static_cast<const Acc*>(p_.lse) + first;
    for (int64_t row = 0; row < padded_rows_; ++row) {
      max_[row] = 0;
      lse_log2_[row] = static_cast<Acc>(INFINITY);
      if (row >= rows_ || lse[row] == -static_cast<Acc>(INFINITY)) continue;
      const bool is_measured = measured_.max && is_large_lse(lse[row]);
      if (is_measured) max_[row] = measured_.max[first + row];
      lse_log2_[row] = is_measured ? measured_.log2_sum[first + row] : static_cast<Acc>(lse[row] * kLog2E);
    }
  }

  int64_t first_row() const { return (item_.batch * p_.num_heads + item_.head) * p_.seqlen_q + item_.rows.begin; }

  template <bool kKnown>
  void walk() {
    if constexpr (kKnown) {
      for (int64_t i = 0; i < padded_rows_ * kLane; ++i) sum_[i] = 0;
    } else {
      Base::clear();
    }
    const int64_t rows = tangents_.count * padded_rows_;
    for (int64_t i = 0; i < rows * width_v_; ++i) out_dot_[i] = 0;
    for (int64_t i = 0; i < rows; ++i) mean_[i] = 0;
    for (int64_t i = 0; i < rows * kLane; ++i) sum_dot_[i] = 0;
    is_first_ = true;
    KeyCursor cursor(item_.keys, item_.num_key_ranges, mask_of(p_, item_.batch));
    while (const int64_t count = cursor.next(keys_, kFwdBlockN)) {
      Base::template load_keys<true>(count);
      load_key_tangents(count);
      for (int64_t row = 0; row < padded_rows_; row += kRows) {
        p_.dropout_p > 0 ? attend<kKnown, true>(row, count) : attend<kKnown, false>(row, count);
      }
      is_first_ = false;
    }
  }

  void load_key_tangents(int64_t count) {
    for (int t = 0; t < tangents_.count; ++t) {
      if (tangents_.k) {
        const Element* k = at(tangents_.k, tangents_.k_step, t, tangents_.k_strides);
        pack_columns<Element>(count, p_.head_dim, KeyRows<Element>{k, tangents_.k_strides.row, keys_, count},
                              k_dot_transposed_ + t * depth_ * kFwdBlockN, Base::columns_of(count), kFwdBlockN);
      }
      if (tangents_.v) {
        const Element* v = at(tangents_.v, tangents_.v_step, t, tangents_.v_strides);
        pack_rows<Element>(depth_of<F>(count) * kTerms<F>, p_.head_dim_v,
                           KeyRows<Element>{v, tangents_.v_strides.row, keys_, count},
                           v_dot_ + t * num_factors<F>(kFwdBlockN) * width_v_, width_v_);
      }
    }
  }

  // kRows rows from `first` on against the keys of the tile.
  template <bool kKnown, bool kDropout>
  void attend(int64_t first, int64_t count) {
    const int64_t columns = Base::columns_of(count), depth = depth_of<F>(count);
    multiply_keys<Update::kSet>(Base::q_ + first * depth_, Base::k_transposed_, columns, Base::s_);
    for (int64_t i = 0; i < kRows; ++i) {
      kKnown ? recall_weights<kDropout>(first, i, count, columns) : make_weights<kDropout>(first, i, count, columns);
    }
    for (int t = 0; t < tangents_.count; ++t) {
      if (tangents_.q) {
        multiply_keys<Update::kSet>(q_dot_ + (t * padded_rows_ + first) * depth_, Base::k_transposed_, columns, s_dot_);
      }
      if (tangents_.k) {
        const F* k_dot = k_dot_transposed_ + t * depth_ * kFwdBlockN;
        tangents_.q ? multiply_keys<Update::kAdd>(Base::q_ + first * depth_, k_dot, columns, s_dot_)
                    : multiply_keys<Update::kSet>(Base::q_ + first * depth_, k_dot, columns, s_dot_);
      }
      Acc* out_dot = out_dot_ + (t * padded_rows_ + first) * width_v_;
      if (tangents_.q || tangents_.k) {
        for (int64_t i = 0; i < kRows; ++i) weigh_tangents<kKnown, kDropout>(t, first, i, columns);
        multiply_values(h_tile_, Base::v_, depth, out_dot);
      }
      if (tangents_.v) {
        multiply_values(Base::p_tile_, v_dot_ + t * num_factors<F>(kFwdBlockN) * width_v_, depth, out_dot);
      }
    }
    // Last, because a reference that moves wants the sums without this tile.
    if constexpr (!kKnown) multiply_values(Base::p_tile_, Base::v_, depth, out_ + first * width_v_);
  }

  template <Update kUpdate>
  void multiply_keys(const F* rows, const F* keys, int64_t columns, Acc* result) const {
    gemm<kUpdate>(kRows, columns, depth_, Operand<F>{rows, depth_, 1}, keys, kFwdBlockN, result, kFwdBlockN);
  }

  void multiply_values(const F* weights, const F* values, int64_t depth, Acc* sums) const {
    gemm<Update::kAdd>(kRows, width_v_, depth, Operand<F>{weights, kFwdBlockN / kTerms<F>, 1}, values, width_v_, sums,
                       width_v_);
  }

  // Row i of those from `first` on.
  template <bool kDropout>
  void make_weights(int64_t first, int64_t i, int64_t count, int64_t columns) {
    const int64_t row = first + i;
    const Acc max_before = max_[row];
    const V mass = load(sum_ + row * kLane);
    const Acc factor =
        Base::template softmax<kDropout, true>(row, Base::s_ + i * kFwdBlockN, count, columns,
                                               Base::p_tile_ + i * kFwdBlockN / kTerms<F>, kept_rows_ + i * kFwdBlockN);
    mass_before_[i] = -1;
    if (max_[row] == max_before) return;
    mass_before_[i] = reduce_sum<Acc>(mass) * factor;
    for (int t = 0; t < tangents_.count; ++t) {
      scale_row(out_dot_ + (t * padded_rows_ + row) * width_v_, width_v_, factor);
      scale_row(sum_dot_ + (t * padded_rows_ + row) * kLane, kLane, factor);
    }
  }

  static void scale_row(Acc* row, int64_t size, Acc factor) {
    for (int64_t i = 0; i < size; i += kLane) store(row + i, load(row + i) * factor);
  }

  // The same from what is known of the row.
  template <bool kDropout>
  void recall_weights(int64_t first, int64_t i, int64_t count, int64_t columns) {
    const int64_t row = first + i;
    Acc *s = Base::s_ + i * kFwdBlockN, *kept = kept_rows_ + i * kFwdBlockN;
    F* p = Base::p_tile_ + i * kFwdBlockN / kTerms<F>;
    for (int64_t j = count; j < columns; ++j) s[j] = -static_cast<Acc>(INFINITY);
    if constexpr (kDropout) Base::draw_dropout(row, count, columns, kept);
    const Acc scale_log2 = Base::scale_.log2, max = max_[row], lse_log2 = lse_log2_[row];
    V sum = load(sum_ + row * kLane);
    for (int64_t j = 0; j < columns; j += 2 * kLane) {
      V weights[2];
      for (int n = 0; n < 2; ++n) {
        Acc* place = s + j + n * kLane;
        weights[n] = exp2<Acc>(scale_log2 * (load(place) - max) - lse_log2);
        sum += weights[n];
        store(place, weights[n]);
        if constexpr (kDropout) weights[n] *= load(kept + j + n * kLane);
      }
      store_two(p + j / kTerms<F>, weights[0], weights[1]);
    }
    store(sum_ + row * kLane, sum);
  }

  // Products of tangents of row i with the keys -> h, as the product with values reads it, and its sum.
  template <bool kKnown, bool kDropout>
  void weigh_tangents(int t, int64_t first, int64_t i, int64_t columns) {
    const int64_t row = t * padded_rows_ + first + i;
    const Acc *p = Base::s_ + i * kFwdBlockN, *kept = kept_rows_ + i * kFwdBlockN;
    Acc* s_dot = s_dot_ + i * kFwdBlockN;
    F* h = h_tile_ + i * kFwdBlockN / kTerms<F>;
    if constexpr (kKnown) {
      if (is_first_) take_reference(row, p, s_dot, columns);
    } else {
      if (mass_before_[i] >= 0) move_reference(row, first + i, mass_before_[i], p, s_dot, columns);
    }
    const Acc mean = mean_[row], scale = tangent_scale_;
    V sum = load(sum_dot_ + row * kLane);
    for (int64_t j = 0; j < columns; j += 2 * kLane) {
      V weighted[2];
      for (int n = 0; n < 2; ++n) {
        const int64_t at = j + n * kLane;
        weighted[n] = load(p + at) * (scale * load(s_dot + at) - mean);
        sum += weighted[n];
        if constexpr (kDropout) weighted[n] *= load(kept + at);
      }
      store_two(h + j / kTerms<F>, weighted[0], weighted[1]);
    }
    store(sum_dot_ + row * kLane, sum);
  }

  // Sum of p, and of p s', in this tile.
  struct Moments {
    Acc mass, tangent;
  };
  Moments moments_of(const Acc* p, const Acc* s_dot, int64_t columns) const {
    V mass = {}, tangent = {};
    for (int64_t j = 0; j < columns; j += kLane) {
      mass += load(p + j);
      tangent += load(p + j) * load(s_dot + j);
    }
    return {reduce_sum<Acc>(mass), tangent_scale_ * reduce_sum<Acc>(tangent)};
  }

  // From here on tangents of the row's scores count from their mean so far, this tile included.
  void move_reference(int64_t row, int64_t query, Acc mass_before, const Acc* p, const Acc* s_dot, int64_t columns) {
    const Moments tile = moments_of(p, s_dot, columns);
    Acc* sums = sum_dot_ + row * kLane;
    const Acc mass = mass_before + tile.mass;
    const Acc before = mean_[row];
    const Acc mean = (reduce_sum<Acc>(load(sums)) + mass_before * before + tile.tangent) / mass;
    if (!(mean - mean == 0)) return;
    const Acc change = before - mean;
    mean_[row] = mean;
    sums[0] += change * mass_before;
    const Acc* out = out_ + query * width_v_;
    Acc* out_dot = out_dot_ + row * width_v_;
    for (int64_t i = 0; i < width_v_; i += kLane) store(out_dot + i, load(out_dot + i) + change * load(out + i));
  }

  // Where nothing can be moved later: the mean of the first tile, if a good part of the row's weight lies there.
  void take_reference(int64_t row, const Acc* p, const Acc* s_dot, int64_t columns) {
    const Moments tile = moments_of(p, s_dot, columns);
    if (tile.mass > Acc(0.125) && tile.tangent - tile.tangent == 0) mean_[row] = tile.tangent / tile.mass;
  }

  // Rows without a key have a sum of 0, and tangents of 0. Returns whether numbers that are not finite were stored of
  // rows whose weights are; after a lift they alone are replaced.
  bool store_tangents() const {
    bool has_overflown = false;
    for (int t = 0; t < tangents_.count; ++t) {
      Element* out_dot = const_cast<Element*>(at(p_.out_dot, p_.out_dot_step, t, p_.out_dot_strides)) +
                         item_.rows.begin * p_.out_dot_strides.row;
      Acc* lse_dot = static_cast<Acc*>(p_.lse_dot) + t * p_.lse_dot_step + first_row();
      for (int64_t row = 0; row < rows_; ++row, out_dot += p_.out_dot_strides.row) {
        const Acc sum = Base::sum_of(row), inverse = sum != 0 ? 1 / sum : Acc(0);
        const Acc mean = reduce_sum<Acc>(load(sum_dot_ + (t * padded_rows_ + row) * kLane)) * inverse;
        const Acc* in = out_dot_ + (t * padded_rows_ + row) * width_v_;
        if (Base::lift_ == 0) lse_dot[row] = sum != 0 ? mean + mean_[t * padded_rows_ + row] : Acc(0);
        for (int64_t d = 0; d < p_.head_dim_v; ++d) {
          const Acc stored = Base::lift_ == 0 ? Acc(0) : to_accumulator(out_dot[d]);
          if (Base::lift_ != 0 && stored - stored == 0) continue;
          const Acc tangent = in[d] * inverse - mean * out_of(row, d, inverse);
          from_accumulator(tangent, out_dot[d]);
          has_overflown |= !(tangent - tangent == 0) && sum - sum == 0;
        }
      }
    }
    return has_overflown;
  }

  Acc out_of(int64_t row, int64_t channel, Acc inverse) const {
    if (!p_.lse_is_known) return out_[row * width_v_ + channel] * inverse;
    const Strides& strides = p_.out_strides;
    return to_accumulator(static_cast<const Element*>(p_.out)[item_.batch * strides.batch + item_.head * strides.head +
                                                              (item_.rows.begin + row) * strides.row + channel]);
  }

  const JvpParams& p_;
  const Tangents& tangents_;
  const RowSums<const Acc> measured_;
  const Acc tangent_scale_;        // of products of tangents, as they are packed, to tangents of scores
  bool is_first_ = true;           // whether the tile of keys is the first
  F* q_dot_ = nullptr;             // [count][rows][depth], like q_
  F* k_dot_transposed_ = nullptr;  // [count][depth][kFwdBlockN]
  F* v_dot_ = nullptr;             // [count][kFwdBlockN / kTerms][width_v]
  Acc* out_dot_;                   // [count][rows][width_v], a
  Acc* mean_;                      // [count][rows], c
  Acc* sum_dot_;                   // [count][rows][lanes], r
  Acc* lse_log2_;                  // [rows], of the scores less max_, where known
  Acc* mass_before_;               // [kRows], sums of p without this tile where m was raised, else -1
  Acc* s_dot_;                     // [kRows][kFwdBlockN], products of tangents, then h
  F* h_tile_;                      // [kRows][kFwdBlockN / kTerms], h
  Acc* kept_rows_;                 // [kRows][kFwdBlockN], dropout's factors
};

template <class Element>
void jvp(const JvpParams& params, const FwdItem& item, const void* row_max, const void* row_log2_sum, void* scratch) {
  [[maybe_unused]] const TileRegistersFor<Factor<Element>> registers;
  using Acc = Accumulator<Element>;
  JvpTile<Element>(params, item, {static_cast<const Acc*>(row_max), static_cast<const Acc*>(row_log2_sum)}, scratch)
      .run();
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
