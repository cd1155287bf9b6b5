// The gradient of out, log-sum-exp and their tangents together: a tile of keys against all query rows that read it.
//
// With directions t, cotangents y_t of out'_t and y of out, and for each row mu_t = lse'_t and the two numbers
// eps_t = <y_t, out> - l_t and gamma = <y, out> - l + sum over t of <y_t, out'_t> (l_t, l: of log-sum-exps),
//
//   z_t = s'_t - mu_t    g_t = p (y_t v^T - eps_t)    ds = p (y v^T + sum y_t v'_t^T - gamma) + sum z_t g_t
//   dq = ds k + sum g_t k'_t    dk = ds^T q + sum g_t^T q'_t    dv = p^T y + sum (p z_t)^T y_t    dq'_t = g_t k
//
// but for the softmax scale, and dropout's factors beside v and in dv. Items and sums are those of the backward.
#pragma once

#include "cpu/simd/bwd_kernel.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

template <class Element>
class BwdJvpTile : BwdTile<Element> {
  using Base = BwdTile<Element>;
  using Base::columns_;
  using Base::count_;
  using Base::depth_;
  using Base::depth_v_;
  using Base::keys_;
  using Base::kLane;
  using Base::kRows;
  using Base::kStrip;
  using Base::width_;
  using typename Base::Acc;
  using typename Base::F;
  using typename Base::QueryRows;
  using typename Base::V;

 public:
  BwdJvpTile(const BwdJvpParams& p, const BwdShared& shared, const BwdJvpShared& rows, const BwdItem& item,
             void* memory)
      : BwdJvpTile(p, shared, rows, item, Scratch(memory)) {}

  void run() {
    Base::gather_keys();
    Base::load_keys();
    load_key_tangents();
    Base::walk_queries([&](Range rows, Range next_rows) { attend(rows, next_rows); },
                       [&](Range rows, const Visit& visit) { add_to_queries(rows, visit); });
    Base::store_keys();
  }

 private:
  BwdJvpTile(const BwdJvpParams& p, const BwdShared& shared, const BwdJvpShared& rows, const BwdItem& item,
             Scratch&& scratch)
      : Base(p, shared, item, static_cast<Scratch&&>(scratch)),
        p_(p),
        tangents_(p.tangents),
        rows_(rows),
        count_t_(p.tangents.count),
        moves_scores_(p.tangents.q || p.tangents.k),
        tangent_scale_(static_cast<Acc>(Base::scale_.log2 * kLn2)) {
    for (int t = 0; t < count_t_; ++t) {
      g_tiles_[t] = WeightTile<F, true>(scratch);
      pz_tiles_[t] = WeightTile<F, false>(scratch);
    }
    if (tangents_.k) {
      k_dot_ = scratch.take<F>(count_t_ * num_factors<F>(kBwdBlockN) * width_);
      k_dot_transposed_ = scratch.take<F>(count_t_ * depth_ * kBwdBlockN);
    }
    if (tangents_.v) v_dot_transposed_ = scratch.take<F>(count_t_ * depth_v_ * kBwdBlockN);
    if (tangents_.q) q_dot_ = scratch.take<F>(count_t_ * kBwdBlockM * depth_);
    dout_dot_ = scratch.take<F>(count_t_ * kBwdBlockM * depth_v_);
    if (p.dq_dot) dq_dot_ = scratch.take<Acc>(count_t_ * kBwdBlockM * width_);
    mu_ = scratch.take<Acc>(count_t_ * kBwdBlockM);
    eps_ = scratch.take<Acc>(count_t_ * kBwdBlockM);
    s_dot_ = scratch.take<Acc>(count_t_ * kRows * kStrip);
    e_ = scratch.take<Acc>(count_t_ * kRows * kStrip);
  }

  void load_key_tangents() {
    for (int t = 0; t < count_t_; ++t) {
      if (tangents_.k) {
        const KeyRows<Element> k{key_rows(tangents_.k, tangents_.k_step, t, tangents_.k_strides)};
        pack_rows<Element>(depth_of<F>(count_) * kTerms<F>, p_.head_dim, k, k_dot_of(t), width_);
        pack_columns<Element>(count_, p_.head_dim, k, k_dot_transposed_ + t * depth_ * kBwdBlockN, columns_,
                              kBwdBlockN);
      }
      if (tangents_.v) {
        const KeyRows<Element> v{key_rows(tangents_.v, tangents_.v_step, t, tangents_.v_strides)};
        pack_columns<Element>(count_, p_.head_dim_v, v, v_dot_transposed_ + t * depth_v_ * kBwdBlockN, columns_,
                              kBwdBlockN);
      }
    }
  }

  KeyRows<Element> key_rows(const void* base, int64_t step, int t, const Strides& strides) const {
    return {Base::at(base, strides, 0) + t * step, strides.row, keys_, count_};
  }

  F* k_dot_of(int t) const { return k_dot_ + t * num_factors<F>(kBwdBlockN) * width_; }

  QueryRows rows_of(const void* base, int64_t step, int t, const Strides& strides, Range rows) const {
    return Base::rows_of(static_cast<const Element*>(base) + t * step, strides, rows);
  }
  QueryRows q_dot_rows(int t, Range rows) const {
    return rows_of(tangents_.q, tangents_.q_step, t, tangents_.q_strides, rows);
  }
  QueryRows dout_dot_rows(int t, Range rows) const {
    return rows_of(p_.dout_dot, p_.dout_dot_step, t, p_.dout_dot_strides, rows);
  }

  // Adds the rows' part to dk and dv, and leaves the keys' part of dq, and of gradients of tangents, in the tile.
  void attend(Range rows, Range next_rows) {
    const int64_t num_rows = rows.end - rows.begin, padded_rows = round_up(num_rows, kRows);
    load_queries(rows, padded_rows);
    for (int64_t column = 0; column < columns_; column += kStrip) {
      const int64_t width = columns_ - column < kStrip ? columns_ - column : kStrip;
      for (int64_t row = 0; row < padded_rows; row += kRows) {
        if (column == 0)
          prefetch(Base::part(rows, rows.begin + row, kRows), Base::part(next_rows, next_rows.begin + row, kRows));
        multiply_strip(row, column, width);
        if (p_.dropout_p > 0) {
          Base::draw_dropout(rows.begin + row, column, width);
          differentiate<true>(row, column, width);
        } else {
          differentiate<false>(row, column, width);
        }
      }
    }
    sum(rows, num_rows, padded_rows);
  }

  void prefetch(Range rows, Range next_rows) const {
    Base::prefetch_dq(rows);
    for (int64_t row = next_rows.begin; row < next_rows.end; ++row) {
      prefetch_row(Base::at(p_.q, p_.q_strides, row), p_.head_dim);
      for (int t = 0; t < count_t_; ++t) {
        if (tangents_.q) prefetch_row(q_dot_rows(t, next_rows)(row - next_rows.begin), p_.head_dim);
        prefetch_row(dout_dot_rows(t, next_rows)(row - next_rows.begin), p_.head_dim_v);
      }
    }
  }

  void load_queries(Range rows, int64_t padded_rows) {
    const auto pack = [&](const QueryRows& row_at, int64_t size, F* out, int64_t depth, Acc scale = 1) {
      for (int64_t row = 0; row < padded_rows; ++row) pack_row(row_at(row), size, out + row * depth, depth, scale);
    };
    pack(Base::rows_of(p_.q, p_.q_strides, rows), p_.head_dim, Base::q_, depth_, Base::scale_.query);
    if (p_.dout) pack(Base::rows_of(p_.dout, p_.dout_strides, rows), p_.head_dim_v, Base::dout_, depth_v_);
    for (int t = 0; t < count_t_; ++t) {
      if (tangents_.q) {
        pack(q_dot_rows(t, rows), p_.head_dim, q_dot_ + t * kBwdBlockM * depth_, depth_, Base::scale_.query);
      }
      pack(dout_dot_rows(t, rows), p_.head_dim_v, dout_dot_ + t * kBwdBlockM * depth_v_, depth_v_);
    }
    Base::load_row_numbers(rows, padded_rows);
    const int64_t first = Base::batch_head_ * p_.seqlen_q + rows.begin;
    for (int t = 0; t < count_t_; ++t) {
      const Acc* mu = static_cast<const Acc*>(p_.lse_dot) + t * p_.lse_dot_step + first;
      const Acc* eps = static_cast<const Acc*>(rows_.eps) + t * rows_.eps_step + first;
      for (int64_t row = 0; row < padded_rows; ++row) {
        const bool is_row = row < rows.end - rows.begin;
        mu_[t * kBwdBlockM + row] = is_row ? mu[row] : Acc(0);
        eps_[t * kBwdBlockM + row] = is_row ? eps[row] : Acc(0);
      }
    }
  }

  // Products of kRows rows with the keys of a strip: s, s'_t, y_t v^T, and in dp_ y v^T + sum y_t v'_t^T.
  void multiply_strip(int64_t row, int64_t column, int64_t width) {
    const auto multiply = [&](auto update, const F* queries, int64_t depth, const F* keys, Acc* result) {
      gemm<decltype(update)::value>(kRows, width, depth, Operand<F>{queries + row * depth, depth, 1}, keys + column,
                                    kBwdBlockN, result, kStrip);
    };
    constexpr std::integral_constant<Update, Update::kSet> kSet;
    constexpr std::integral_constant<Update, Update::kAdd> kAdd;
    multiply(kSet, Base::q_, depth_, Base::k_transposed_, Base::s_);
    if (p_.dout) multiply(kSet, Base::dout_, depth_v_, Base::v_transposed_, Base::dp_);
    for (int t = 0; t < count_t_; ++t) {
      Acc* s_dot = s_dot_ + t * kRows * kStrip;
      const F* dout_dot = dout_dot_ + t * kBwdBlockM * depth_v_;
      if (tangents_.q) multiply(kSet, q_dot_ + t * kBwdBlockM * depth_, depth_, Base::k_transposed_, s_dot);
      if (tangents_.k) {
        const F* k_dot = k_dot_transposed_ + t * depth_ * kBwdBlockN;
        tangents_.q ? multiply(kAdd, Base::q_, depth_, k_dot, s_dot) : multiply(kSet, Base::q_, depth_, k_dot, s_dot);
      }
      multiply(kSet, dout_dot, depth_v_, Base::v_transposed_, e_ + t * kRows * kStrip);
      if (tangents_.v) {
        const F* v_dot = v_dot_transposed_ + t * depth_v_ * kBwdBlockN;
        p_.dout || t > 0 ? multiply(kAdd, dout_dot, depth_v_, v_dot, Base::dp_)
                         : multiply(kSet, dout_dot, depth_v_, v_dot, Base::dp_);
      }
    }
  }

  template <bool kDropout>
  void differentiate(int64_t first_row, int64_t first_column, int64_t width) {
    Base::subtract_max(first_row, width);
    const bool has_dp = p_.dout || tangents_.v;
    const Acc scale_log2 = Base::scale_.log2, tangent_scale = tangent_scale_;
    for (int64_t row = 0; row < kRows; row += 2) {
      for (int64_t column = 0; column < width; column += 2 * kLane) {
        const auto for_each = [&](auto body) {
          for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 2; ++j) body(i, j, (row + i) * kStrip + column + j * kLane);
          }
        };
        V weight[2][2], kept[2][2], p[2][2], ds[2][2];
        for_each([&](int i, int j, int64_t at) {
          weight[i][j] = exp2<Acc>(scale_log2 * load(Base::s_ + at) - Base::lse_log2_[first_row + row + i]);
          const V dp = has_dp ? load(Base::dp_ + at) : V{};
          const Acc gamma = Base::delta_[first_row + row + i];
          if constexpr (kDropout) {
            kept[i][j] = load(Base::kept_ + at);
            p[i][j] = kept[i][j] * weight[i][j];
            ds[i][j] = weight[i][j] * (kept[i][j] * dp - gamma);
          } else {
            p[i][j] = weight[i][j];
            ds[i][j] = weight[i][j] * (dp - gamma);
          }
        });
        const int64_t place_row = first_row + row, place_column = first_column + column;
        if (p_.dout) Base::p_tile_.put(place_row, place_column, p);
        for (int t = 0; t < count_t_; ++t) {
          const Acc *s_dot = s_dot_ + t * kRows * kStrip, *e = e_ + t * kRows * kStrip;
          V g[2][2], pz[2][2];
          for_each([&](int i, int j, int64_t at) {
            const int64_t number = t * kBwdBlockM + place_row + i;
            const V moved = moves_scores_ ? tangent_scale * load(s_dot + at) : V{};
            const V z = moved - mu_[number];
            V dp = load(e + at);
            if constexpr (kDropout) dp *= kept[i][j];
            g[i][j] = weight[i][j] * (dp - eps_[number]);
            ds[i][j] += z * g[i][j];
            pz[i][j] = p[i][j] * z;
          });
          g_tiles_[t].put(place_row, place_column, g);
          if (moves_scores_) pz_tiles_[t].put(place_row, place_column, pz);
        }
        Base::ds_tile_.put(place_row, place_column, ds);
      }
    }
  }

  void sum(Range rows, int64_t num_rows, int64_t padded_rows) {
    const auto add = [&](KeySums<Element>& sums, const auto& weights, const QueryRows& row_at) {
      sums.pack(padded_rows, row_at);
      sums.add(weights, num_rows, count_);
    };
    const auto multiply = [&](auto update, const WeightTile<F, true>& weights, const F* keys, Acc* result) {
      gemm<decltype(update)::value>(padded_rows, width_, depth_of<F>(count_), weights.along_rows(), keys, width_,
                                    result, width_);
    };
    Base::ds_tile_.clear_columns(count_, padded_rows);
    add(Base::dk_, Base::ds_tile_, Base::rows_of(p_.q, p_.q_strides, rows));
    multiply(std::integral_constant<Update, Update::kSet>(), Base::ds_tile_, Base::k_, Base::dq_);
    if (p_.dout) {
      Base::p_tile_.clear_columns(count_, padded_rows);
      add(Base::dv_, Base::p_tile_, Base::rows_of(p_.dout, p_.dout_strides, rows));
    }
    for (int t = 0; t < count_t_; ++t) {
      g_tiles_[t].clear_columns(count_, padded_rows);
      if (tangents_.q) add(Base::dk_, g_tiles_[t], q_dot_rows(t, rows));
      if (moves_scores_) {
        pz_tiles_[t].clear_columns(count_, padded_rows);
        add(Base::dv_, pz_tiles_[t], dout_dot_rows(t, rows));
      }
      if (tangents_.k) multiply(std::integral_constant<Update, Update::kAdd>(), g_tiles_[t], k_dot_of(t), Base::dq_);
      if (p_.dq_dot) {
        multiply(std::integral_constant<Update, Update::kSet>(), g_tiles_[t], Base::k_,
                 dq_dot_ + t * kBwdBlockM * width_);
      }
    }
  }

  void add_to_queries(Range rows, const Visit& visit) {
    Base::add_dq(rows, visit);
    const int64_t size = p_.dq_dot == rows_.dq_dot_acc ? sizeof(Element) : sizeof(Acc);
    for (int t = 0; t < count_t_ && p_.dq_dot; ++t) {
      void* sums = static_cast<char*>(rows_.dq_dot_acc) + t * rows_.dq_dot_acc_step * size;
      void* result = static_cast<Element*>(p_.dq_dot) + t * p_.dq_dot_step;
      Base::add_to_queries(rows, visit, dq_dot_ + t * kBwdBlockM * width_, sums, rows_.dq_dot_acc_strides, result,
                           p_.dq_dot_strides);
    }
  }

  const BwdJvpParams& p_;
  const Tangents& tangents_;
  const BwdJvpShared& rows_;
  const int count_t_;
  const bool moves_scores_;  // else values move alone, and all z are 0
  const Acc tangent_scale_;  // of products of tangents, as they are packed, to tangents of scores
  WeightTile<F, true> g_tiles_[kMaxTangents];
  WeightTile<F, false> pz_tiles_[kMaxTangents];
  F* k_dot_ = nullptr;             // [count][keys / kTerms][width]
  F* k_dot_transposed_ = nullptr;  // [count][depth][kBwdBlockN]
  F* v_dot_transposed_ = nullptr;  // [count][depth_v][kBwdBlockN]
  F* q_dot_ = nullptr;             // [count][rows][depth], like q_
  F* dout_dot_;                    // [count][rows][depth_v]
  Acc* dq_dot_ = nullptr;          // [count][rows][width], this item's part
  Acc *mu_, *eps_;                 // [count][rows]
  Acc* s_dot_;                     // [count][kRows][kStrip]
  Acc* e_;                         // [count][kRows][kStrip], y_t v^T
};

template <class Element>
void bwd_jvp(const BwdJvpParams& params, const BwdShared& shared, const BwdJvpShared& rows, const BwdItem& item,
             void* scratch) {
  [[maybe_unused]] const TileRegistersFor<Factor<Element>> registers;
  BwdJvpTile<Element>(params, shared, rows, item, scratch).run();
}

// eps of all directions, and gamma.
template <class Element>
void bwd_jvp_rows(const BwdJvpParams& p, int64_t batch, int64_t head, Range rows, void* eps, int64_t eps_step,
                  void* gamma) {
  using Acc = Accumulator<Element>;
  const int64_t first = (batch * p.num_heads + head) * p.seqlen_q;
  const auto row_of = [&](const void* base, const Strides& strides, int64_t row) {
    return static_cast<const Element*>(base) + batch * strides.batch + head * strides.head + row * strides.row;
  };
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const Element* out = row_of(p.out, p.out_strides, row);
    Acc sum = p.dlse ? -static_cast<const Acc*>(p.dlse)[first + row] : Acc(0);
    if (p.dout) sum += dot(out, row_of(p.dout, p.dout_strides, row), p.head_dim_v);
    for (int t = 0; t < p.tangents.count; ++t) {
      const Element* dout_dot = row_of(p.dout_dot, p.dout_dot_strides, row) + t * p.dout_dot_step;
      const Element* out_dot = row_of(p.out_dot, p.out_dot_strides, row) + t * p.out_dot_step;
      const Acc dlse_dot = p.dlse_dot ? static_cast<const Acc*>(p.dlse_dot)[t * p.dlse_dot_step + first + row] : Acc(0);
      sum += dot(dout_dot, out_dot, p.head_dim_v);
      static_cast<Acc*>(eps)[t * eps_step + first + row] = dot(dout_dot, out, p.head_dim_v) - dlse_dot;
    }
    static_cast<Acc*>(gamma)[first + row] = sum;
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
