// Forward: one tile of query rows against all keys of its segment, by online softmax.
//
// Scores are scaled to base 2 where they are read, so that p = exp2(scale * s - softmax_base): 16-bit queries are
// multiplied as they are. The softmax_base is scale * m for a score m of the row, rounded. Where that rounding is
// large, m is subtracted first, exactly where it matters: p = exp2(scale * (s - m)).
#pragma once

#include <cmath>
#include <limits>

#include "cpu/simd/dropout.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/keys.h"
#include "cpu/simd/scratch.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

inline constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// How the softmax scale is shared between queries, as they are packed for scores, and scores. Queries take the power of
// two of a scale below 1: so a product overflows only where the score would.
template <class F>
struct ScoreScale {
  using Acc = SumOf<F>;
  Acc query = 1;
  Acc log2;  // positive, to base 2: scores of columns without a key are -inf and have to stay so

  explicit ScoreScale(double softmax_scale) {
    double rest = softmax_scale;
    if constexpr (kTerms<F> == 1) {  // pairs of bf16 are packed as they are
      int exponent = 1;
      if (rest < 1) rest = 2 * std::frexp(rest, &exponent);  // 1 to 2, or 0
      query = static_cast<Acc>(rest == 0 ? 0 : std::ldexp(0.5, exponent));
      if (rest == 0) rest = 1;
    }
    constexpr double kLowest = std::numeric_limits<Acc>::min(), kLargest = std::numeric_limits<Acc>::max();
    rest *= kLog2E;
    log2 = static_cast<Acc>(rest < kLowest ? kLowest : rest > kLargest ? kLargest : rest);
  }
};

// What a row's weights are relative to: p = exp2(scale * (s - max)) / 2^log2_sum.
template <class Acc>
struct RowSums {
  Acc* max;       // (batch_size, num_heads, seqlen_q)
  Acc* log2_sum;  // likewise
};

template <class Element>
class FwdTile {
 protected:
  using F = Factor<Element>;
  using Acc = Accumulator<Element>;
  using V = Vec<Acc>;
  static constexpr int kLane = kLanes<Acc>;
  static constexpr int64_t kRows = kRowBlock<F>;  // whose scores are made at a time
  // How far above m a score may come, to base 2, before m is raised to it: weights up to 2^8 are as exact as up to 1,
  // and after its first tile a row hardly ever has to rescale.
  static constexpr Acc kHeadroom = 8;
  // Weights of at most 2^(8 - 64) keep sums of as many of the largest values as there can be finite.
  static constexpr Acc kLift = 64;

 public:
  FwdTile(const AttentionParams& p, const FwdItem& item, void* memory) : FwdTile(p, item, Scratch(memory)) {}

  void run(const FwdParams& p) {
    load_queries();
    walk_keys<true>();
    if (!store_rows(p)) return;
    // Sums of values have overflowed. Their means may not, and come from weights that are small throughout.
    lift_ = kLift;
    walk_keys<true>();
    store_rows(p);
  }

  // No values, only what the rows' weights are relative to.
  void measure(RowSums<Acc> result) {
    load_queries();
    walk_keys<false>();
    const int64_t first = (item_.batch * p_.num_heads + item_.head) * p_.seqlen_q + item_.rows.begin;
    for (int64_t row = 0; row < rows_; ++row) {
      result.max[first + row] = max_[row];
      result.log2_sum[first + row] = std::log2(sum_of(row));
    }
  }

 protected:
  FwdTile(const AttentionParams& p, const FwdItem& item, Scratch&& scratch)
      : p_(p),
        item_(item),
        rows_(item.rows.end - item.rows.begin),
        padded_rows_(round_up(rows_, kRows)),
        depth_(depth_of<F>(p.head_dim)),
        width_v_(round_up(p.head_dim_v, kLane)),
        scale_(p.softmax_scale),
        headroom_(std::numeric_limits<Acc>::max() < kHeadroom / scale_.log2 ? std::numeric_limits<Acc>::max()
                                                                            : kHeadroom / scale_.log2),
        dropout_(p) {
    q_ = scratch.take<F>(padded_rows_ * depth_);
    out_ = scratch.take<Acc>(padded_rows_ * width_v_);
    max_ = scratch.take<Acc>(padded_rows_);
    sum_ = scratch.take<Acc>(padded_rows_ * kLane);
    k_transposed_ = scratch.take<F>(depth_ * kFwdBlockN);
    v_ = scratch.take<F>(num_factors<F>(kFwdBlockN) * width_v_);
    s_ = scratch.take<Acc>(kRows * kFwdBlockN);
    p_tile_ = weights_of(s_, scratch);
    kept_ = scratch.take<Acc>(kFwdBlockN);
    keys_ = scratch.take<Key>(kFwdBlockN);
  }

  template <bool kValues>
  void walk_keys() {
    clear();
    KeyCursor cursor(item_.keys, item_.num_key_ranges, mask_of(p_, item_.batch));
    while (const int64_t count = cursor.next(keys_, kFwdBlockN)) {
      load_keys<kValues>(count);
      for (int64_t row = 0; row < padded_rows_; row += kRows) attend<kValues>(row, count);
    }
  }

  void clear() {
    for (int64_t i = 0; i < padded_rows_ * width_v_; ++i) out_[i] = 0;
    for (int64_t i = 0; i < padded_rows_; ++i) max_[i] = -static_cast<Acc>(INFINITY);
    for (int64_t i = 0; i < padded_rows_ * kLane; ++i) sum_[i] = 0;
  }

  // The score up to which m stays. It is finite once m is, so that an infinite one is above it.
  Acc limit_of(Acc max) const {
    constexpr Acc kLargest = std::numeric_limits<Acc>::max();
    const Acc limit = max + headroom_;
    return limit < kLargest ? limit : kLargest;
  }

  void load_queries() {
    const Element* q = static_cast<const Element*>(p_.q) + item_.batch * p_.q_strides.batch +
                       item_.head * p_.q_strides.head + item_.rows.begin * p_.q_strides.row;
    for (int64_t row = 0; row < padded_rows_; ++row) {
      pack_row(row < rows_ ? q + row * p_.q_strides.row : nullptr, p_.head_dim, q_ + row * depth_, depth_,
               scale_.query);
    }
  }

  template <bool kValues>
  void load_keys(int64_t count) {
    const Element* k =
        static_cast<const Element*>(p_.k) + item_.batch * p_.k_strides.batch + item_.head * p_.k_strides.head;
    pack_columns<Element>(count, p_.head_dim, KeyRows{k, p_.k_strides.row, keys_, count}, k_transposed_,
                          columns_of(count), kFwdBlockN);
    if constexpr (!kValues) return;
    const Element* v =
        static_cast<const Element*>(p_.v) + item_.batch * p_.v_strides.batch + item_.head * p_.v_strides.head;
    pack_rows<Element>(depth_of<F>(count) * kTerms<F>, p_.head_dim_v, KeyRows{v, p_.v_strides.row, keys_, count}, v_,
                       width_v_);
  }

  // The columns that so many keys take.
  static int64_t columns_of(int64_t count) { return round_up(count, 2 * kLane); }

  // kRows rows from `first` on against the keys of the tile.
  template <bool kValues>
  void attend(int64_t first, int64_t count) {
    const int64_t columns = columns_of(count);
    gemm<Update::kSet>(kRows, columns, depth_, Operand<F>{q_ + first * depth_, depth_, 1}, k_transposed_, kFwdBlockN,
                       s_, kFwdBlockN);
    for (int64_t i = 0; i < kRows; ++i) {
      Acc* s = s_ + i * kFwdBlockN;
      F* p = p_tile_ + i * kFwdBlockN / kTerms<F>;
      kValues&& p_.dropout_p > 0 ? softmax<true, false>(first + i, s, count, columns, p, kept_)
                                 : softmax<false, false>(first + i, s, count, columns, p, kept_);
    }
    if constexpr (!kValues) return;
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

  // Turns a row of scores into weights relative to the row's m, and what was summed so far with it. Returns by what the
  // latter was multiplied. With kInPlace weights come in the place of the scores as well, as they are before dropout.
  template <bool kDropout, bool kInPlace>
  Acc softmax(int64_t row, Acc* s, int64_t count, int64_t columns, F* p, Acc* kept) {
    for (int64_t i = count; i < columns; ++i) s[i] = -static_cast<Acc>(INFINITY);
    V tile_max = load(s);
    for (int64_t i = kLane; i < columns; i += kLane) tile_max = max<Acc>(load(s + i), tile_max);
    const Acc factor = any_above<Acc>(tile_max, limit_of(max_[row])) ? raise_max(row, tile_max) : Acc(1);
    if constexpr (kDropout) draw_dropout(row, count, columns, kept);
    const SoftmaxBase softmax_base = softmax_base_of(max_[row]);
    for (int64_t i = 0; i < columns && softmax_base.subtracted != 0; i += kLane) {
      store(s + i, load(s + i) - softmax_base.subtracted);
    }
    const Acc scaled = softmax_base.scaled + lift_;
    const Acc scale_log2 = scale_.log2;
    V sum = load(sum_ + row * kLane);
    for (int64_t i = 0; i < columns; i += 2 * kLane) {
      V first = exp2<Acc>(scale_log2 * load(s + i) - scaled);
      V second = exp2<Acc>(scale_log2 * load(s + i + kLane) - scaled);
      sum += first + second;
      if constexpr (kInPlace) {
        store(s + i, first);
        store(s + i + kLane, second);
      }
      if constexpr (kDropout) {
        first *= load(kept + i);
        second *= load(kept + i + kLane);
      }
      store_two(p + i / kTerms<F>, first, second);
    }
    store(sum_ + row * kLane, sum);
    return factor;
  }

  void draw_dropout(int64_t row, int64_t count, int64_t columns, Acc* kept) {
    dropout_.weights(item_.rows.begin + row, item_.batch * p_.num_heads + item_.head, keys_, count, kept);
    for (int64_t i = count; i < columns; ++i) kept[i] = 0;
  }

  // Exponents of weights are scale * (s - subtracted) - scaled.
  struct SoftmaxBase {
    Acc subtracted, scaled;
  };

  SoftmaxBase softmax_base_of(Acc max) const {
    const Acc scaled = scale_.log2 * max;
    if (std::abs(scaled) <= kLargestSoftmaxBase) return {0, scaled};
    // As long as all scores are -inf their weights are 0.
    return {max == -static_cast<Acc>(INFINITY) ? 0 : max, 0};
  }

  // Returns by what the sums were multiplied.
  Acc raise_max(int64_t row, V tile_max) {
    const SoftmaxBase before = softmax_base_of(max_[row]);
    const SoftmaxBase after = softmax_base_of(max_[row] = reduce_max<Acc>(tile_max));
    const Acc change = std::fma(scale_.log2, before.subtracted - after.subtracted, before.scaled - after.scaled);
    const V factor = exp2<Acc>(broadcast(change < 0 ? change : Acc(0)));
    store(sum_ + row * kLane, load(sum_ + row * kLane) * factor);
    Acc* out = out_ + row * width_v_;
    for (int64_t i = 0; i < width_v_; i += kLane) store(out + i, load(out + i) * factor);
    return factor[0];
  }

  Acc sum_of(int64_t row) const { return reduce_sum<Acc>(load(sum_ + row * kLane)); }

  // Rows without a key, or whose scores are all -inf, have a sum of 0: in others some score has a weight of about 1.
  // Returns whether numbers that are not finite were stored, of rows whose weights are; later they are replaced alone.
  bool store_rows(const FwdParams& p) {
    Element* out = static_cast<Element*>(p.out) + item_.batch * p.out_strides.batch + item_.head * p.out_strides.head +
                   item_.rows.begin * p.out_strides.row;
    Acc* lse = static_cast<Acc*>(p.lse) + (item_.batch * p.num_heads + item_.head) * p.seqlen_q + item_.rows.begin;
    bool has_overflown = false;
    for (int64_t row = 0; row < rows_; ++row) {
      const Acc sum = sum_of(row), inverse = sum != 0 ? 1 / sum : Acc(0);
      const Acc* in = out_ + row * width_v_;
      Element* out_row = out + row * p.out_strides.row;
      if (lift_ == 0) {
        store_row(in, p.head_dim_v, inverse, out_row);
        lse[row] = sum != 0 ? lse_of(row, sum) : -static_cast<Acc>(INFINITY);
        has_overflown |= sum - sum == 0 && !is_finite(in, inverse);
      } else {
        replace_overflown(in, p.head_dim_v, inverse, out_row);
      }
    }
    return has_overflown;
  }

  // In fp64, for no digit of the result shall be lost on the way.
  Acc lse_of(int64_t row, Acc sum) const {
    return static_cast<Acc>((static_cast<double>(scale_.log2) * max_[row] + std::log2(static_cast<double>(sum))) *
                            kLn2);
  }

  bool is_finite(const Acc* row, Acc scale) const {
    V zero = {};
    for (int64_t i = 0; i < width_v_; i += kLane) zero += load(row + i) * scale * 0;
    return reduce_sum<Acc>(zero) == 0;
  }

  void replace_overflown(const Acc* in, int64_t size, Acc inverse, Element* out) const {
    constexpr Acc kLargest = std::numeric_limits<Acc>::max();
    for (int64_t i = 0; i < size; ++i) {
      const Acc stored = to_accumulator(out[i]);
      if (stored - stored == 0) continue;
      Acc mean = in[i] * inverse;
      // A mean of finite numbers is not above the largest of them, but for its roundings.
      if (in[i] - in[i] == 0 && p_.dropout_p == 0)
        mean = mean > kLargest ? kLargest : mean < -kLargest ? -kLargest : mean;
      from_accumulator(mean, out[i]);
    }
  }

  const AttentionParams& p_;
  const FwdItem& item_;
  const int64_t rows_, padded_rows_, depth_, width_v_;
  const ScoreScale<F> scale_;
  const Acc headroom_;  // kHeadroom, before scores are scaled
  const Dropout dropout_;
  Acc lift_ = 0;     // that weights are smaller by, to base 2
  F* q_;             // [rows][depth], with their part of the softmax scale
  Acc* out_;         // [rows][width_v], not yet divided by the sum
  Acc* max_;         // [rows], m, the score that weights are relative to
  Acc* sum_;         // [rows][lanes]
  F* k_transposed_;  // [depth][kFwdBlockN]
  F* v_;             // [kFwdBlockN / kTerms][width_v]
  Acc* s_;           // [kRows][kFwdBlockN], scores, then weights
  F* p_tile_;        // [kRows][kFwdBlockN / kTerms], weights
  Acc* kept_;        // [kFwdBlockN], dropout's factors
  Key* keys_;        // [kFwdBlockN]
};

template <class Element>
void fwd(const FwdParams& params, const FwdItem& item, void* scratch) {
  [[maybe_unused]] const TileRegistersFor<Factor<Element>> registers;
  FwdTile<Element>(params, item, scratch).run(params);
}

template <class Element>
void measure(const AttentionParams& params, const FwdItem& item, void* scratch, void* max, void* log2_sum) {
  [[maybe_unused]] const TileRegistersFor<Factor<Element>> registers;
  using Acc = Accumulator<Element>;
  FwdTile<Element>(params, item, scratch).measure({static_cast<Acc*>(max), static_cast<Acc*>(log2_sum)});
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
