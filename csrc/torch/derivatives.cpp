#include "torch/derivatives.h"

#include <ATen/Context.h>
#include <ATen/DimVector.h>
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <array>

#include "derivatives_params.h"
#include "torch/call.h"
#include "torch/checks.h"
#include "torch/ops.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kRows = "(directions, batch_size, rows, num_heads, channels)";
constexpr const char* kNumbers = "(directions, batch_size, num_heads, seqlen_q)";

void check_like_q(const char* name, const Tensor& tensor, const Tensor& q, at::ScalarType dtype, int64_t rank,
                  const char* shape) {
  check_dense(name, tensor);
  check_device(name, tensor, q.device(), "like q");
  check_dtype(name, tensor, dtype, "to match q");
  check_rank(name, tensor, rank, shape);
}

// How many directions there are.
int64_t check_tangents(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_dot,
                       const OptionalTensor& k_dot, const OptionalTensor& v_dot) {
  int64_t count = -1;
  const auto check = [&](const char* name, const OptionalTensor& tangent, const Tensor& primal) {
    if (!tangent) return;
    check_like_q(name, *tangent, q, q.scalar_type(), 5, kRows);
    if (has_symbolic_sizes({&primal, &*tangent})) {
      count = std::max<int64_t>(count, 0);
      return;
    }
    if (count < 0) count = tangent->size(0);
    at::DimVector expected(primal.sizes());
    if (expected[0] == 1 && tangent->size(1) == q.size(0)) expected[0] = q.size(0);
    expected.insert(expected.begin(), count);
    check_shape(name, *tangent, expected, "of the tensor that it moves, behind the directions");
    TORCH_CHECK_VALUE(count > 0, name, ": expected at least one direction, got shape ", tangent->sizes());
  };
  check("q_dot", q_dot, q);
  check("k_dot", k_dot, k);
  check("v_dot", v_dot, v);
  TORCH_CHECK_VALUE(count >= 0, "q_dot: expected a tangent of q, k or v, got none");
  return count;
}

void check_outputs(const Tensor& q, const Tensor& v, const Tensor& out, const Tensor& lse) {
  check_like_q("out", out, q, q.scalar_type(), 4, "(batch_size, seqlen_q, num_heads, head_dim_v)");
  check_like_q("lse", lse, q, lse_dtype(q), 3, "(batch_size, num_heads, seqlen_q)");
  if (has_symbolic_sizes({&q, &v, &out, &lse})) return;
  check_shape("out", out, {q.size(0), q.size(1), q.size(2), v.size(3)}, "to match the inputs");
  check_shape("lse", lse, {q.size(0), q.size(2), q.size(1)}, "to match the inputs");
}

// What kernels read, owned as long as they run.
OptionalTensor readable(const char* name, const OptionalTensor& tensor) {
  if (!tensor) return std::nullopt;
  check_memory(name, *tensor);
  return last_dim_contiguous(*tensor);
}

OptionalTensor contiguous(const char* name, const OptionalTensor& tensor) {
  if (!tensor) return std::nullopt;
  check_memory(name, *tensor);
  return tensor->contiguous();
}

// Strides of tangents in one direction.
Strides strides_behind_directions(const Tensor& tensor) { return strides(tensor.select(0, 0)); }

struct TangentTensors {
  OptionalTensor q, k, v;

  TangentTensors(const Call& call, const OptionalTensor& q_dot, const OptionalTensor& k_dot,
                 const OptionalTensor& v_dot)
      : q(readable("q_dot", q_dot)), k(readable("k_dot", k_dot)), v(readable("v_dot", v_dot)) {
    if (q) q = call.like_q(*q);
  }

  // Those of some of the directions.
  Tangents params(int64_t begin, int64_t count, int64_t batch_size) const {
    Tangents result{};
    result.count = static_cast<int>(count);
    const auto set = [&](const OptionalTensor& tensor, const void*& data, Strides& strides, int64_t& step) {
      if (!tensor) return;
      const Tensor first = tensor->select(0, begin);
      data = first.const_data_ptr();
      strides = mixed_attention::strides(first);
      if (first.size(0) == 1 && batch_size != 1) strides.batch = 0;
      step = tensor->stride(0);
    };
    set(q, result.q, result.q_strides, result.q_step);
    set(k, result.k, result.k_strides, result.k_step);
    set(v, result.v, result.v_strides, result.v_step);
    return result;
  }
};

// Calls run(begin, count) for groups of directions as large as kernels take.
template <class Run>
void for_each_group(int64_t count, int64_t most, Run run) {
  for (int64_t begin = 0; begin < count; begin += most) run(begin, std::min(most, count - begin));
}

// Writes tangents of out and lse; out and lse as well, if they are not known.
std::tuple<Tensor, Tensor> tangents_of(const Call& call, const TangentTensors& tangents, int64_t count,
                                       const Tensor& out, const Tensor& lse, bool is_known) {
  const Tensor& q = call.q;
  const c10::DeviceGuard guard(q.device());
  Tensor out_dot = at::empty({count, q.size(0), q.size(1), q.size(2), call.v.size(3)}, q.options());
  Tensor lse_dot = at::empty({count, q.size(0), q.size(2), q.size(1)}, q.options().dtype(lse_dtype(q)));
  for_each_group(count, kMaxTangents, [&](int64_t begin, int64_t size) {
    JvpParams params{};
    fill(params, call);
    params.lse_is_known = is_known || begin > 0;
    // NOTE: what is known is read alone.
    params.out = const_cast<void*>(out.const_data_ptr());
    params.lse = const_cast<void*>(lse.const_data_ptr());
    params.out_strides = strides(out);
    params.tangents = tangents.params(begin, size, q.size(0));
    params.out_dot = out_dot.select(0, begin).mutable_data_ptr();
    params.lse_dot = lse_dot.select(0, begin).mutable_data_ptr();
    params.out_dot_strides = strides_behind_directions(out_dot);
    params.out_dot_step = out_dot.stride(0);
    params.lse_dot_step = lse_dot.stride(0);
    run_jvp(params, q);
  });
  return {out_dot, lse_dot};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_jvp(const Tensor& q, const Tensor& k, const Tensor& v,
                                                       const OptionalTensor& q_dot, const OptionalTensor& k_dot,
                                                       const OptionalTensor& v_dot, at::IntArrayRef segments,
                                                       double softmax_scale, const OptionalTensor& key_padding_mask,
                                                       double dropout_p, const OptionalTensor& dropout_seed) {
  const Call call =
      prepare(Pass::kForward, q, k, v, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed);
  const int64_t count = check_tangents(q, k, v, q_dot, k_dot, v_dot);
  Tensor out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(lse_dtype(q)));
  auto [out_dot, lse_dot] = tangents_of(call, {call, q_dot, k_dot, v_dot}, count, out, lse, false);
  return {out, lse, out_dot, lse_dot};
}

std::tuple<Tensor, Tensor> jvp(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                               const OptionalTensor& q_dot, const OptionalTensor& k_dot, const OptionalTensor& v_dot,
                               at::IntArrayRef segments, double softmax_scale, const OptionalTensor& key_padding_mask,
                               double dropout_p, const OptionalTensor& dropout_seed) {
  const Call call =
      prepare(Pass::kForward, q, k, v, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed);
  check_outputs(q, v, out, lse);
  const int64_t count = check_tangents(q, k, v, q_dot, k_dot, v_dot);
  check_memory("out", out);
  check_memory("lse", lse);
  return tangents_of(call, {call, q_dot, k_dot, v_dot}, count, last_dim_contiguous(out), lse.contiguous(), true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_jvp(
    const Tensor& dout_dot, const OptionalTensor& dlse_dot, const OptionalTensor& dout, const OptionalTensor& dlse,
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const OptionalTensor& q_dot, const OptionalTensor& k_dot, const OptionalTensor& v_dot, const Tensor& out_dot,
    const Tensor& lse_dot, at::IntArrayRef segments, double softmax_scale, const OptionalTensor& key_padding_mask,
    double dropout_p, const OptionalTensor& dropout_seed, bool wants_dq_dot) {
  const Call call =
      prepare(Pass::kBackward, q, k, v, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed);
  check_backward_jvp(dout_dot, dlse_dot, dout, dlse, q, k, v, out, lse, q_dot, k_dot, v_dot, out_dot, lse_dot,
                     wants_dq_dot);
  const TangentTensors tangents(call, q_dot, k_dot, v_dot);
  const OptionalTensor out_rows = readable("out", out), dout_rows = readable("dout", dout);
  const OptionalTensor out_dot_rows = readable("out_dot", out_dot), dout_dot_rows = readable("dout_dot", dout_dot);
  const OptionalTensor lse_rows = contiguous("lse", lse), dlse_rows = contiguous("dlse", dlse);
  const OptionalTensor lse_dot_rows = contiguous("lse_dot", lse_dot), dlse_dot_rows = contiguous("dlse_dot", dlse_dot);
  const c10::DeviceGuard guard(q.device());
  const int64_t count = dout_dot.size(0);
  at::DimVector dq_dot_shape(q.sizes());
  dq_dot_shape.insert(dq_dot_shape.begin(), wants_dq_dot ? count : 0);
  const Tensor dq_dot = at::empty(dq_dot_shape, q.options());
  std::array<Tensor, 3> sums;
  for_each_group(count, q.is_cpu() ? kMaxTangents : 1, [&](int64_t begin, int64_t size) {
    const Tensor dq = at::empty(q.sizes(), q.options());
    const Tensor dk = at::empty({q.size(0), k.size(1), k.size(2), k.size(3)}, k.options());
    const Tensor dv = at::empty({q.size(0), v.size(1), v.size(2), v.size(3)}, v.options());
    BwdJvpParams params{};
    fill(params, call);
    params.dq = dq.mutable_data_ptr();
    params.dk = dk.mutable_data_ptr();
    params.dv = dv.mutable_data_ptr();
    params.dq_strides = strides(dq);
    params.dk_strides = strides(dk);
    params.dv_strides = strides(dv);
    params.out = out_rows->const_data_ptr();
    params.out_strides = strides(*out_rows);
    params.lse = lse_rows->const_data_ptr();
    if (dout && begin == 0) {
      params.dout = dout_rows->const_data_ptr();
      params.dout_strides = strides(*dout_rows);
    }
    if (dlse && begin == 0) params.dlse = dlse_rows->const_data_ptr();
    params.tangents = tangents.params(begin, size, q.size(0));
    params.out_dot = out_dot_rows->select(0, begin).const_data_ptr();
    params.out_dot_strides = strides_behind_directions(*out_dot_rows);
    params.out_dot_step = out_dot_rows->stride(0);
    params.lse_dot = lse_dot_rows->select(0, begin).const_data_ptr();
    params.lse_dot_step = lse_dot_rows->stride(0);
    params.dout_dot = dout_dot_rows->select(0, begin).const_data_ptr();
    params.dout_dot_strides = strides_behind_directions(*dout_dot_rows);
    params.dout_dot_step = dout_dot_rows->stride(0);
    if (dlse_dot) {
      params.dlse_dot = dlse_dot_rows->select(0, begin).const_data_ptr();
      params.dlse_dot_step = dlse_dot_rows->stride(0);
    }
    if (wants_dq_dot) {
      params.dq_dot = dq_dot.select(0, begin).mutable_data_ptr();
      params.dq_dot_strides = strides_behind_directions(dq_dot);
      params.dq_dot_step = dq_dot.stride(0);
    }
    params.deterministic = at::globalContext().deterministicAlgorithms();
    run_bwd_jvp(params, q);
    const std::array<Tensor, 3> grads{dq, sum_broadcast(dk, k), sum_broadcast(dv, v)};
    for (size_t i = 0; i < grads.size(); ++i) sums[i] = begin == 0 ? grads[i] : sums[i].add_(grads[i]);
  });
  call.restore_like_q(sums[0]);
  call.restore_like_q(dq_dot);
  return {sums[0], sums[1], sums[2], dq_dot};
}

void check_jvp(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& out, const OptionalTensor& lse,
               const OptionalTensor& q_dot, const OptionalTensor& k_dot, const OptionalTensor& v_dot) {
  if (out && lse) check_outputs(q, v, *out, *lse);
  check_tangents(q, k, v, q_dot, k_dot, v_dot);
}

void check_backward_jvp(const Tensor& dout_dot, const OptionalTensor& dlse_dot, const OptionalTensor& dout,
                        const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& out, const Tensor& lse, const OptionalTensor& q_dot, const OptionalTensor& k_dot,
                        const OptionalTensor& v_dot, const Tensor& out_dot, const Tensor& lse_dot, bool wants_dq_dot) {
  check_outputs(q, v, out, lse);
  const int64_t count = check_tangents(q, k, v, q_dot, k_dot, v_dot);
  TORCH_CHECK_VALUE(q_dot || !wants_dq_dot, "q_dot: expected a tensor, as its gradient is wanted, got None");
  check_like_q("dout_dot", dout_dot, q, q.scalar_type(), 5, kRows);
  check_like_q("out_dot", out_dot, q, q.scalar_type(), 5, kRows);
  check_like_q("lse_dot", lse_dot, q, lse_dtype(q), 4, kNumbers);
  if (dlse_dot) check_like_q("dlse_dot", *dlse_dot, q, lse_dtype(q), 4, kNumbers);
  if (dout) check_like_q("dout", *dout, q, q.scalar_type(), 4, "(batch_size, seqlen_q, num_heads, head_dim_v)");
  if (dlse) check_like_q("dlse", *dlse, q, lse_dtype(q), 3, "(batch_size, num_heads, seqlen_q)");
  if (has_symbolic_sizes({&q, &v, &out, &dout_dot, &out_dot, &lse_dot})) return;
  const at::DimVector rows{q.size(0), q.size(1), q.size(2), v.size(3)}, numbers{q.size(0), q.size(2), q.size(1)};
  const auto check = [&](const char* name, const Tensor& tensor, at::DimVector shape, bool has_directions) {
    if (has_directions) shape.insert(shape.begin(), count);
    if (!has_symbolic_sizes({&tensor})) check_shape(name, tensor, shape, "to match the inputs");
  };
  check("dout_dot", dout_dot, rows, true);
  check("out_dot", out_dot, rows, true);
  check("lse_dot", lse_dot, numbers, true);
  if (dlse_dot) check("dlse_dot", *dlse_dot, numbers, true);
  if (dout) check("dout", *dout, rows, false);
  if (dlse) check("dlse", *dlse, numbers, false);
}

}  // namespace mixed_attention
