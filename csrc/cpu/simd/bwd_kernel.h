// Backward: one tile of keys against all query rows that read it.
//
// A work item owns dk and dv of its keys and adds its part to dq of every query tile it visits. The parts are added in
// the order of the items, whoever runs them: an item waits until the item before it has added its own. So the sum, bit
// for bit, does not depend on the number of threads; and as items start in order and walk the queries in the same
// order, they follow each other at a distance of one tile and rarely wait.
//
// Weights come from the log-sum-exp. A large one is too coarse for that (kLargestSoftmaxBase); of such rows what they
// are relative to has been measured anew, by the forward's own products, which make the same scores bit for bit.
#pragma once

#include "cpu/simd/fwd_kernel.h"
#include "cpu/simd/key_sums.h"
#include "cpu/simd/weight_tile.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

template <class Element>
class BwdTile {
 protected:
  using F = Factor<Element>;
  using Acc = Accumulator<Element>;
  using V = Vec<Acc>;
  static constexpr int kLane = kLanes<Acc>;
  // Rows and columns of scores that are made at a time.
  static constexpr int64_t kRows = kRowBlock<F>, kStrip = kBlockVectors * kLane;

 public:
  BwdTile(const BwdParams& p, const BwdShared& shared, const BwdItem& item, void* memory)
      : BwdTile(p, shared, item, Scratch(memory)) {}

  void run() {
    gather_keys();
    load_keys();
    walk_queries([&](Range rows, Range next_rows) { attend(rows, next_rows); },
                 [&](Range rows, const Visit& visit) { add_dq(rows, visit); });
    store_keys();
  }

 protected:
  BwdTile(const BwdParams& p, const BwdShared& shared, const BwdItem& item, Scratch&& scratch)
      : p_(p),
        shared_(shared),
        item_(item),
        batch_head_(item.batch * p.num_heads + item.head),
        depth_(depth_of<F>(p.head_dim)),
        depth_v_(depth_of<F>(p.head_dim_v)),
        width_(round_up(p.head_dim, kLane)),
        scale_(p.softmax_scale),
        dropout_(p),
        p_tile_(scratch),
        ds_tile_(scratch),
        dk_(p.head_dim, scratch),
        dv_(p.head_dim_v, scratch) {
    k_ = scratch.take<F>(num_factors<F>(kBwdBlockN) * width_);
    k_transposed_ = scratch.take<F>(depth_ * kBwdBlockN);
    v_transposed_ = scratch.take<F>(depth_v_ * kBwdBlockN);
    q_ = scratch.take<F>(kBwdBlockM * depth_);
    dout_ = scratch.take<F>(kBwdBlockM * depth_v_);
    dq_ = scratch.take<Acc>(kBwdBlockM * width_);
    max_ = scratch.take<Acc>(kBwdBlockM);
    lse_log2_ = scratch.take<Acc>(kBwdBlockM);
    delta_ = scratch.take<Acc>(kBwdBlockM);
    s_ = scratch.take<Acc>(kRows * kStrip);
    dp_ = scratch.take<Acc>(kRows * kStrip);
    kept_ = scratch.take<Acc>(kRows * kStrip);
    keys_ = scratch.take<Key>(kBwdBlockN);
  }

  void gather_keys() {
    KeyCursor cursor(&item_.keys, 1, mask_of(p_, item_.batch));
    count_ = cursor.next(keys_, kBwdBlockN);
    columns_ = round_up(count_, 2 * kLane);
  }

  // Calls attend(rows, next_rows), if there are keys, and then add(rows, visit) for tile after tile of the queries; add
  // when all items before this one have added to the sums of those rows.
  template <class Attend, class Add>
  void walk_queries(Attend attend, Add add) {
    for (int64_t i = 0; i < item_.num_visits; ++i) {
      const Visit& visit = item_.visits[i];
      locate_keys(visit);
      int* progress = shared_.progress + batch_head_ * shared_.tiles_per_head + visit.first_tile;
      for (int64_t begin = visit.queries.begin; begin < visit.queries.end; begin += kBwdBlockM, ++progress) {
        const Range rows = part(visit.queries, begin, kBwdBlockM);
        if (count_ > 0) attend(rows, part(visit.queries, begin + kBwdBlockM, kBwdBlockM));
        if (visit.rank > 0) shared_.wait_until(progress, visit.rank);
        add(rows, visit);
        __atomic_store_n(progress, visit.rank + 1, __ATOMIC_RELEASE);
      }
    }
  }

  void load_keys() {
    const KeyRows<Element> k{at(p_.k, p_.k_strides, 0), p_.k_strides.row, keys_, count_};
    const KeyRows<Element> v{at(p_.v, p_.v_strides, 0), p_.v_strides.row, keys_, count_};
    pack_rows<Element>(depth_of<F>(count_) * kTerms<F>, p_.head_dim, k, k_, width_);
    pack_columns<Element>(count_, p_.head_dim, k, k_transposed_, columns_, kBwdBlockN);
    pack_columns<Element>(count_, p_.head_dim_v, v, v_transposed_, columns_, kBwdBlockN);
    dk_.clear();
    dv_.clear();
  }

  // Where the keys lie in the list of the segment that reads them: dropout draws by that.
  void locate_keys(const Visit& visit) {
    for (int64_t i = 0; i < count_; ++i) {
      keys_[i].range_index = visit.range_index;
      keys_[i].offset = visit.range_offset + keys_[i].row - item_.keys.begin;
    }
  }

  // Adds the rows' part to dk and dv, and leaves the keys' part of dq in dq_.
  void attend(Range rows, Range next_rows) {
    const int64_t num_rows = rows.end - rows.begin, padded_rows = round_up(num_rows, kRows);
    load_queries(rows, padded_rows);
    for (int64_t column = 0; column < columns_; column += kStrip) {
      const int64_t width = columns_ - column < kStrip ? columns_ - column : kStrip;
      for (int64_t row = 0; row < padded_rows; row += kRows) {
        if (column == 0) {
          prefetch_dq(part(rows, rows.begin + row, kRows));
          prefetch_queries(part(next_rows, next_rows.begin + row, kRows));
        }
        gemm<Update::kSet>(kRows, width, depth_, Operand<F>{q_ + row * depth_, depth_, 1}, k_transposed_ + column,
                           kBwdBlockN, s_, kStrip);
        gemm<Update::kSet>(kRows, width, depth_v_, Operand<F>{dout_ + row * depth_v_, depth_v_, 1},
                           v_transposed_ + column, kBwdBlockN, dp_, kStrip);
        if (p_.dropout_p > 0) {
          draw_dropout(rows.begin + row, column, width);
          differentiate<true>(row, column, width);
        } else {
          differentiate<false>(row, column, width);
        }
      }
    }
    p_tile_.clear_columns(count_, padded_rows);
    ds_tile_.clear_columns(count_, padded_rows);
    dv_.add(p_tile_, num_rows, count_);
    dk_.add(ds_tile_, num_rows, count_);
    gemm<Update::kSet>(padded_rows, width_, depth_of<F>(count_), ds_tile_.along_rows(), k_, width_, dq_, width_);
  }

  // Row i of some queries in q, dout or the like; null behind the last.
  struct QueryRows {
    const Element* base;
    int64_t row_stride, count;

    const Element* operator()(int64_t i) const { return i < count ? base + i * row_stride : nullptr; }
  };
  QueryRows rows_of(const void* base, const Strides& strides, Range rows) const {
    return {at(base, strides, rows.begin), strides.row, rows.end - rows.begin};
  }

  void load_queries(Range rows, int64_t padded_rows) {
    const QueryRows q = rows_of(p_.q, p_.q_strides, rows), dout = rows_of(p_.dout, p_.dout_strides, rows);
    for (int64_t row = 0; row < padded_rows; ++row) {
      pack_row(q(row), p_.head_dim, q_ + row * depth_, depth_, scale_.query);
      pack_row(dout(row), p_.head_dim_v, dout_ + row * depth_v_, depth_v_);
    }
    dk_.pack(padded_rows, q);
    dv_.pack(padded_rows, dout);
    load_row_numbers(rows, padded_rows);
  }

  void load_row_numbers(Range rows, int64_t padded_rows) {
    const int64_t first = batch_head_ * p_.seqlen_q + rows.begin;
    for (int64_t row = 0; row < padded_rows; ++row) {
      const bool is_row = row < rows.end - rows.begin;
      max_[row] = 0;
      lse_log2_[row] = is_row ? static_cast<Acc>(static_cast<const Acc*>(p_.lse)[first + row] * kLog2E) : Acc(0);
      delta_[row] = is_row ? static_cast<const Acc*>(shared_.delta)[first + row] : Acc(0);
      if (!is_row || lse_log2_[row] == -static_cast<Acc>(INFINITY)) {
        // Rows behind the last, and those whose scores are all -inf, have weights of 0.
        lse_log2_[row] = static_cast<Acc>(INFINITY);
      } else if (shared_.row_max && is_large_lse(static_cast<const Acc*>(p_.lse)[first + row])) {
        max_[row] = static_cast<const Acc*>(shared_.row_max)[first + row];
        lse_log2_[row] = static_cast<const Acc*>(shared_.row_log2_sum)[first + row];
      }
    }
  }

  // Up to so many of the rows, none behind the last.
  static Range part(Range rows, int64_t begin, int64_t count) {
    return {begin, begin + count < rows.end ? begin + count : rows.end};
  }

  // NOTE: other keys' items have gone over the same rows, more than L2 holds. Asked for a tile ahead and a few at a
  // time they come while products run: with AMX, where these take little time, a fifth of it went into waiting for
  // rows.
  void prefetch_queries(Range rows) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      prefetch_row(at(p_.q, p_.q_strides, row), p_.head_dim);
      prefetch_row(at(p_.dout, p_.dout_strides, row), p_.head_dim_v);
    }
  }

  void prefetch_dq(Range rows) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      prefetch_row(sum_at(shared_.dq_acc, shared_.dq_acc_strides, row), p_.head_dim);
    }
  }

  void draw_dropout(int64_t query_row, int64_t column, int64_t width) {
    const int64_t count = count_ - column < width ? count_ - column : width;
    for (int64_t i = 0; i < kRows; ++i) {
      Acc* kept = kept_ + i * kStrip;
      dropout_.weights(query_row + i, batch_head_, keys_ + column, count, kept);
      for (int64_t j = count; j < width; ++j) kept[j] = 0;
    }
  }

  void subtract_max(int64_t first_row, int64_t width) {
    for (int64_t row = 0; row < kRows; ++row) {
      const Acc max = max_[first_row + row];
      Acc* s = s_ + row * kStrip;
      for (int64_t i = 0; i < width && max != 0; i += kLane) store(s + i, load(s + i) - max);
    }
  }

  // Scores and dp of kRows rows and the columns of a strip -> p (times dropout's factors, as dv needs it) and ds.
  template <bool kDropout>
  void differentiate(int64_t first_row, int64_t first_column, int64_t width) {
    const Acc scale_log2 = scale_.log2;
    subtract_max(first_row, width);
    for (int64_t row = 0; row < kRows; row += 2) {
      for (int64_t column = 0; column < width; column += 2 * kLane) {
        V p[2][2], ds[2][2];
        for (int i = 0; i < 2; ++i) {
          const Acc lse_log2 = lse_log2_[first_row + row + i], delta = delta_[first_row + row + i];
          for (int j = 0; j < 2; ++j) {
            const int64_t at = (row + i) * kStrip + column + j * kLane;
            const V weight = exp2<Acc>(scale_log2 * load(s_ + at) - lse_log2);
            if constexpr (kDropout) {
              const V kept = load(kept_ + at);
              p[i][j] = kept * weight;
              ds[i][j] = weight * (kept * load(dp_ + at) - delta);
            } else {
              p[i][j] = weight;
              ds[i][j] = weight * (load(dp_ + at) - delta);
            }
          }
        }
        p_tile_.put(first_row + row, first_column + column, p);
        ds_tile_.put(first_row + row, first_column + column, ds);
      }
    }
  }

  void add_dq(Range rows, const Visit& visit) {
    add_to_queries(rows, visit, dq_, shared_.dq_acc, shared_.dq_acc_strides, p_.dq, p_.dq_strides);
  }

  // Adds parts to sums of rows; sums that are complete go to their place, unless they are there.
  void add_to_queries(Range rows, const Visit& visit, const Acc* parts, void* sums, const Strides& sum_strides,
                      void* result, const Strides& result_strides) const {
    const Acc scale = static_cast<Acc>(p_.softmax_scale);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const Acc* part = parts + (row - rows.begin) * width_;
      Acc* sum = sum_at(sums, sum_strides, row);
      if (visit.rank == 0) {
        for (int64_t i = 0; i < p_.head_dim; ++i) sum[i] = 0;
      }
      if (count_ > 0) {
        for (int64_t i = 0; i < p_.head_dim; ++i) sum[i] += scale * part[i];
      }
      if (visit.is_last && sums != result) store_row(sum, p_.head_dim, Acc(1), at(result, result_strides, row));
    }
  }

  Acc* sum_at(void* sums, const Strides& strides, int64_t row) const {
    return first_row<Acc>(sums, strides) + row * strides.row;
  }

  template <class Out>
  Out* first_row(void* base, const Strides& strides) const {
    return static_cast<Out*>(base) + item_.batch * strides.batch + item_.head * strides.head;
  }

  void store_keys() { shared_.wide_keys ? store_keys_as<Acc>() : store_keys_as<Element>(); }

  template <class Out>
  void store_keys_as() {
    store_gradient(dk_, p_.head_dim, static_cast<Acc>(p_.softmax_scale), first_row<Out>(p_.dk, p_.dk_strides),
                   p_.dk_strides.row);
    store_gradient(dv_, p_.head_dim_v, Acc(1), first_row<Out>(p_.dv, p_.dv_strides), p_.dv_strides.row);
  }

  // Rows of gathered keys back to their places, exact zeros for those that the mask left out.
  template <class Out>
  void store_gradient(const KeySums<Element>& sums, int64_t size, Acc scale, Out* out, int64_t row_stride) {
    sums.write(count_, scale, [&](int64_t i) { return out + keys_[i].row * row_stride; });
    int64_t i = 0;
    for (int64_t row = item_.keys.begin; row < item_.keys.end; ++row) {
      if (i < count_ && keys_[i].row == row) {
        ++i;
      } else {
        for (int64_t d = 0; d < size; ++d) from_accumulator(Acc(0), out[row * row_stride + d]);
      }
    }
  }

  template <class Pointer>
  auto at(Pointer base, Strides strides, int64_t row) const {
    using Target = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const Element, Element>;
    return static_cast<Target*>(base) + item_.batch * strides.batch + item_.head * strides.head + row * strides.row;
  }

  const BwdParams& p_;
  const BwdShared& shared_;
  const BwdItem& item_;
  const int64_t batch_head_, depth_, depth_v_, width_;
  const ScoreScale<F> scale_;
  const Dropout dropout_;
  WeightTile<F, false> p_tile_;
  WeightTile<F, true> ds_tile_;
  KeySums<Element> dk_, dv_;
  int64_t count_ = 0, columns_ = 0;
  F* k_;             // [keys / kTerms][width]
  F* k_transposed_;  // [depth][kBwdBlockN]
  F* v_transposed_;  // [depth_v][kBwdBlockN]
  F* q_;             // [rows][depth], with their part of the softmax scale
  F* dout_;          // [rows][depth_v]
  Acc* dq_;          // [rows][width], this item's part
  Acc* max_;         // [rows], the score that weights are relative to, where the log-sum-exp is large; otherwise 0
  Acc* lse_log2_;    // [rows], of the scores less max_
  Acc* delta_;       // [rows]
  Acc* s_;           // [kRows][kStrip], scores
  Acc* dp_;          // [kRows][kStrip]
  Acc* kept_;        // [kRows][kStrip], dropout's factors
  Key* keys_;        // [keys]
};

template <class Element>
void bwd(const BwdParams& params, const BwdShared& shared, const BwdItem& item, void* scratch) {
  [[maybe_unused]] const TileRegistersFor<Factor<Element>> registers;
  BwdTile<Element>(params, shared, item, scratch).run();
}

template <class Element>
Accumulator<Element> dot(const Element* a, const Element* b, int64_t size) {
  using Acc = Accumulator<Element>;
  Acc sums[kLanes<Acc>] = {};  // as many as a vector holds, so that the compiler may use one
  int64_t i = 0;
  for (; i + kLanes<Acc> <= size; i += kLanes<Acc>) {
    for (int lane = 0; lane < kLanes<Acc>; ++lane) {
      sums[lane] += to_accumulator(a[i + lane]) * to_accumulator(b[i + lane]);
    }
  }
  for (int lane = 0; i < size; ++i, ++lane) sums[lane] += to_accumulator(a[i]) * to_accumulator(b[i]);
  return reduce_sum<Acc>(load(sums));
}

// delta = row sum of out * dout, less the gradient of lse; dq of rows that nobody will visit is zeroed by the caller.
template <class Element>
void delta(const BwdParams& p, int64_t batch, int64_t head, Range rows, void* result) {
  using Acc = Accumulator<Element>;
  const int64_t first = (batch * p.num_heads + head) * p.seqlen_q;
  const Element* out = static_cast<const Element*>(p.out) + batch * p.out_strides.batch + head * p.out_strides.head;
  const Element* dout = static_cast<const Element*>(p.dout) + batch * p.dout_strides.batch + head * p.dout_strides.head;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const Acc sum = p.dlse ? -static_cast<const Acc*>(p.dlse)[first + row] : Acc(0);
    const Element* out_row = out + row * p.out_strides.row;
    const Element* dout_row = dout + row * p.dout_strides.row;
    static_cast<Acc*>(result)[first + row] = sum + dot(out_row, dout_row, p.head_dim_v);
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
