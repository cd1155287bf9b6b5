// Backward: one tile of keys against all query rows that read it.
//
// A task owns dk and dv of its keys and adds its part to dq of every query tile it visits. The parts are added in the
// order of the tasks, whoever runs them: a task waits until the task before it has added its own. So the sum, bit for
// bit, does not depend on the number of threads; and as tasks start in order and walk the queries in the same order,
// they follow each other at a distance of one tile and rarely wait.
#pragma once

#include "cpu/simd/fwd_kernel.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

template <class Element>
class BwdTile {
  using Acc = Accumulator<Element>;
  using V = Vec<Acc>;
  static constexpr int kLane = kLanes<Acc>;

 public:
  BwdTile(const BwdParams& p, const BwdShared& shared, const BwdTask& task, void* memory)
      : p_(p),
        shared_(shared),
        task_(task),
        batch_head_(task.batch * p.num_heads + task.head),
        width_(round_up(p.head_dim, kLane)),
        width_v_(round_up(p.head_dim_v, kLane)),
        dropout_(p) {
    Scratch scratch(memory);
    k_ = scratch.take<Acc>(kBwdBlockN * width_);
    k_transposed_ = scratch.take<Acc>(p.head_dim * kBwdBlockN);
    v_transposed_ = scratch.take<Acc>(p.head_dim_v * kBwdBlockN);
    dk_ = scratch.take<Acc>(kBwdBlockN * width_);
    dv_ = scratch.take<Acc>(kBwdBlockN * width_v_);
    q_ = scratch.take<Acc>(kBwdBlockM * width_);
    dout_ = scratch.take<Acc>(kBwdBlockM * width_v_);
    dq_ = scratch.take<Acc>(kBwdBlockM * width_);
    p_tile_ = scratch.take<Acc>(kBwdBlockM * kBwdBlockN);
    ds_ = scratch.take<Acc>(kBwdBlockM * kBwdBlockN);
    kept_ = scratch.take<Acc>(kBwdBlockN);
    keys_ = scratch.take<Key>(kBwdBlockN);
  }

  void run() {
    KeyCursor cursor(&task_.keys, 1, mask_of(p_, task_.batch));
    count_ = cursor.next(keys_, kBwdBlockN);
    columns_ = round_up(count_, kLane);
    load_keys();
    for (int64_t i = 0; i < task_.num_visits; ++i) {
      const Visit& visit = task_.visits[i];
      locate_keys(visit);
      int* progress = shared_.progress + batch_head_ * shared_.tiles_per_head + visit.first_tile;
      for (int64_t begin = visit.queries.begin; begin < visit.queries.end; begin += kBwdBlockM, ++progress) {
        const int64_t end = begin + kBwdBlockM;
        const Range rows{begin, end < visit.queries.end ? end : visit.queries.end};
        if (count_ > 0) attend(rows);
        if (visit.rank > 0) shared_.wait_until(progress, visit.rank);
        add_dq(rows, visit);
        __atomic_store_n(progress, visit.rank + 1, __ATOMIC_RELEASE);
      }
    }
    store_keys();
  }

 private:
  void load_keys() {
    const Element* k = at(p_.k, p_.k_strides, 0);
    const Element* v = at(p_.v, p_.v_strides, 0);
    pack_rows(k, p_.k_strides.row, keys_, count_, p_.head_dim, k_, width_);
    pack_transposed(k, p_.k_strides.row, keys_, count_, p_.head_dim, k_transposed_, kBwdBlockN);
    pack_transposed(v, p_.v_strides.row, keys_, count_, p_.head_dim_v, v_transposed_, kBwdBlockN);
    for (int64_t i = 0; i < kBwdBlockN * width_; ++i) dk_[i] = 0;
    for (int64_t i = 0; i < kBwdBlockN * width_v_; ++i) dv_[i] = 0;
  }

  // Where the keys lie in the list of the segment that reads them: dropout draws by that.
  void locate_keys(const Visit& visit) {
    for (int64_t i = 0; i < count_; ++i) {
      keys_[i].range_index = visit.range_index;
      keys_[i].offset = visit.range_offset + keys_[i].row - task_.keys.begin;
    }
  }

  // Adds the rows' part to dk and dv, and leaves the keys' part of dq in dq_.
  void attend(Range rows) {
    const int64_t num_rows = rows.end - rows.begin, padded_rows = round_up(num_rows, kRowBlock);
    load_queries(rows, padded_rows);
    gemm<Update::kSet>(padded_rows, columns_, p_.head_dim, Operand<Acc>{q_, width_, 1}, k_transposed_, kBwdBlockN,
                       p_tile_, kBwdBlockN);
    gemm<Update::kSet>(padded_rows, columns_, p_.head_dim_v, Operand<Acc>{dout_, width_v_, 1}, v_transposed_,
                       kBwdBlockN, ds_, kBwdBlockN);
    const Acc* lse = static_cast<const Acc*>(p_.lse) + batch_head_ * p_.seqlen_q + rows.begin;
    const Acc* delta = static_cast<const Acc*>(shared_.delta) + batch_head_ * p_.seqlen_q + rows.begin;
    for (int64_t row = 0; row < num_rows; ++row) differentiate(row, rows.begin + row, lse[row], delta[row]);
    const int64_t key_rows = round_up(count_, kRowBlock);
    clear_columns(num_rows, key_rows);
    gemm<Update::kAdd>(key_rows, width_v_, num_rows, Operand<Acc>{p_tile_, 1, kBwdBlockN}, dout_, width_v_, dv_,
                       width_v_);
    gemm<Update::kAdd>(key_rows, width_, num_rows, Operand<Acc>{ds_, 1, kBwdBlockN}, q_, width_, dk_, width_);
    gemm<Update::kSet>(padded_rows, width_, count_, Operand<Acc>{ds_, kBwdBlockN, 1}, k_, width_, dq_, width_);
  }

  void load_queries(Range rows, int64_t padded_rows) {
    const Element* q = at(p_.q, p_.q_strides, rows.begin);
    const Element* dout = at(p_.dout, p_.dout_strides, rows.begin);
    const Acc scale = static_cast<Acc>(p_.softmax_scale * kLog2E);
    for (int64_t row = 0; row < padded_rows; ++row) {
      const bool is_row = row < rows.end - rows.begin;
      fill_row(is_row ? q + row * p_.q_strides.row : nullptr, p_.head_dim, scale, q_ + row * width_, width_);
      fill_row(is_row ? dout + row * p_.dout_strides.row : nullptr, p_.head_dim_v, Acc(1), dout_ + row * width_v_,
               width_v_);
    }
  }

  static void fill_row(const Element* in, int64_t size, Acc scale, Acc* out, int64_t width) {
    if (in) load_row(in, size, scale, out);
    for (int64_t i = in ? size : 0; i < width; ++i) out[i] = 0;
  }

  // Row of scores and of dp -> p (times dropout's factors, as dv needs it) and ds.
  void differentiate(int64_t row, int64_t query_row, Acc lse, Acc delta) {
    Acc* p = p_tile_ + row * kBwdBlockN;
    Acc* ds = ds_ + row * kBwdBlockN;
    const Acc lse_log2 = static_cast<Acc>(lse * kLog2E);
    if (p_.dropout_p > 0) {
      for (int64_t i = count_; i < columns_; ++i) kept_[i] = 0;
      dropout_.weights(query_row, batch_head_, keys_, count_, kept_);
    }
    for (int64_t i = 0; i < columns_; i += kLane) {
      // Rounding may leave a score a little above its log-sum-exp.
      const V weight = exp2_nonpositive<Acc>(min_zero(load(p + i) - lse_log2));
      const V kept = p_.dropout_p > 0 ? load(kept_ + i) : broadcast(Acc(1));
      store(ds + i, weight * (kept * load(ds + i) - delta));
      store(p + i, kept * weight);
    }
  }

  static V min_zero(V x) { return x > 0 ? V{} : x; }

  // Columns behind the keys take part in the products for dv and dk as rows: they must be zero.
  void clear_columns(int64_t num_rows, int64_t key_rows) {
    for (int64_t row = 0; row < num_rows && count_ < key_rows; ++row) {
      for (int64_t i = count_; i < key_rows; ++i) p_tile_[row * kBwdBlockN + i] = ds_[row * kBwdBlockN + i] = 0;
    }
  }

  void add_dq(Range rows, const Visit& visit) {
    const Strides strides = shared_.dq_acc_strides;
    Acc* sums = static_cast<Acc*>(shared_.dq_acc) + task_.batch * strides.batch + task_.head * strides.head;
    const Acc scale = static_cast<Acc>(p_.softmax_scale);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const Acc* part = dq_ + (row - rows.begin) * width_;
      Acc* sum = sums + row * strides.row;
      if (visit.rank == 0) {
        for (int64_t i = 0; i < p_.head_dim; ++i) sum[i] = 0;
      }
      if (count_ > 0) {
        for (int64_t i = 0; i < p_.head_dim; ++i) sum[i] += scale * part[i];
      }
      if (visit.is_last && shared_.dq_acc != p_.dq) {
        store_row(sum, p_.head_dim, Acc(1), at(p_.dq, p_.dq_strides, row));
      }
    }
  }

  void store_keys() {
    // ds was taken times q * softmax_scale * log2(e).
    store_gradient(dk_, width_, p_.head_dim, static_cast<Acc>(kLn2), at(p_.dk, p_.dk_strides, 0), p_.dk_strides.row);
    store_gradient(dv_, width_v_, p_.head_dim_v, Acc(1), at(p_.dv, p_.dv_strides, 0), p_.dv_strides.row);
  }

  // Rows of gathered keys back to their places, exact zeros for those that the mask left out.
  void store_gradient(const Acc* grad, int64_t width, int64_t size, Acc scale, Element* out, int64_t row_stride) {
    int64_t i = 0;
    for (int64_t row = task_.keys.begin; row < task_.keys.end; ++row) {
      if (i < count_ && keys_[i].row == row) {
        store_row(grad + i++ * width, size, scale, out + row * row_stride);
      } else {
        for (int64_t d = 0; d < size; ++d) from_accumulator(Acc(0), out[row * row_stride + d]);
      }
    }
  }

  template <class Pointer>
  auto at(Pointer base, Strides strides, int64_t row) const {
    using Target = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const Element, Element>;
    return static_cast<Target*>(base) + task_.batch * strides.batch + task_.head * strides.head + row * strides.row;
  }

  const BwdParams& p_;
  const BwdShared& shared_;
  const BwdTask& task_;
  const int64_t batch_head_, width_, width_v_;
  const Dropout dropout_;
  int64_t count_ = 0, columns_ = 0;
  Acc* k_;             // [keys][width]
  Acc* k_transposed_;  // [head_dim][kBwdBlockN]
  Acc* v_transposed_;  // [head_dim_v][kBwdBlockN]
  Acc* dk_;            // [keys][width]
  Acc* dv_;            // [keys][width_v]
  Acc* q_;             // [rows][width], times softmax_scale * log2(e)
  Acc* dout_;          // [rows][width_v]
  Acc* dq_;            // [rows][width], this task's part
  Acc* p_tile_;        // [rows][kBwdBlockN], scores, then weights
  Acc* ds_;            // [rows][kBwdBlockN], dp, then ds
  Acc* kept_;          // [kBwdBlockN], dropout's factors
  Key* keys_;          // [keys]
};

template <class Element>
void bwd(const BwdParams& params, const BwdShared& shared, const BwdTask& task, void* scratch) {
  BwdTile<Element>(params, shared, task, scratch).run();
}

// delta = row sum of out * dout, less the gradient of lse; dq of rows that nobody will visit is zeroed by the caller.
template <class Element>
void delta(const BwdParams& p, int64_t batch, int64_t head, Range rows, void* result) {
  using Acc = Accumulator<Element>;
  const int64_t first = (batch * p.num_heads + head) * p.seqlen_q;
  const Element* out = static_cast<const Element*>(p.out) + batch * p.out_strides.batch + head * p.out_strides.head;
  const Element* dout = static_cast<const Element*>(p.dout) + batch * p.dout_strides.batch + head * p.dout_strides.head;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    Acc sum = p.dlse ? -static_cast<const Acc*>(p.dlse)[first + row] : Acc(0);
    const Element* out_row = out + row * p.out_strides.row;
    const Element* dout_row = dout + row * p.dout_strides.row;
    for (int64_t i = 0; i < p.head_dim_v; ++i) sum += to_accumulator(out_row[i]) * to_accumulator(dout_row[i]);
    static_cast<Acc*>(result)[first + row] = sum;
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
