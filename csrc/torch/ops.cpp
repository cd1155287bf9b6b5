#include "torch/ops.h"

#include <ATen/Context.h>
#include <ATen/DimVector.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>

#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/launch.h"
#include "cuda/problem.h"
#include "environment.h"
#include "kernels.h"
#include "params.h"
#include "torch/call.h"
#include "torch/checks.h"
#include "torch/schedules.h"
#include "torch/torch_internals.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType to_dtype(const char* name, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: TORCH_CHECK_VALUE(false, name, ": expected dtype float32, float64, bfloat16 or float16, got ", dtype);
  }
}

}  // namespace

// A batch or head of one row may carry any stride; kernels never step along it.
Strides strides(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

Tensor last_dim_contiguous(const Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

at::ScalarType lse_dtype(const Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

bool takes_wide_keys(const Tensor& q) { return q.is_cpu() && q.element_size() == 2; }

namespace {

Strides strides_broadcast(const Tensor& tensor, int64_t batch_size) {
  Strides result = strides(tensor);
  if (tensor.size(0) == 1 && batch_size != 1) result.batch = 0;
  return result;
}

void parallel_for(int num_workers, void (*task)(int worker, void* context), void* context) {
  at::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) task(static_cast<int>(worker), context);
  });
}

// What torch's own matrix products of fp32 on GPUs go by.
bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// Refuses what the environment asks for in vain.
void check_environment(const Tensor& tensor) {
  try {
    if (tensor.is_cpu()) {
      cpu::instruction_set();
    } else {
      asks_for_portable_gpu_kernels();
    }
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// Fields that depend on where the call runs.
template <class Params>
void fill_device(Params& params, const Tensor& tensor) {
  check_environment(tensor);
  if (tensor.is_cpu()) {
    params.parallel_for = parallel_for;
    params.num_threads = at::get_num_threads();
  } else {
    params.device = tensor.device().index();
    params.stream = current_stream(tensor);
    if constexpr (std::is_base_of_v<AttentionParams, Params>) params.allow_tf32 = allows_tf32();
  }
}

// refusal: empty where there is none.
void check_served(const std::string& refusal) {
  TORCH_CHECK_NOT_IMPLEMENTED(refusal.empty(), "no CUDA kernel serves this call: ", refusal,
                              "; mixed_attention.reference.attention computes it");
}

// Memory for one call. It goes back to torch's allocator at once: that hands it on in the order of the stream.
Tensor allocate_workspace(size_t bytes, const Tensor& like) {
  return bytes == 0 ? Tensor() : at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

template <class Params>
void run(const kernels::Launch<Params>& launch, Params& params, const Tensor& q) {
  const Tensor workspace = allocate_workspace(launch.workspace_size, q);
  if (workspace.defined()) params.workspace = workspace.mutable_data_ptr();
  launch.run(params);
}

template <class Params>
void run_on_gpu(Params& params, const Tensor& q) {
  const kernels::Launch launch = kernels::plan(params);
  check_served(launch.choice.why_none());
  run(launch, params, q);
}

void run_fwd(FwdParams& params, const Tensor& q) { q.is_cpu() ? cpu::run_fwd(params) : run_on_gpu(params, q); }

// Whether it ran: where the gradients are the inputs themselves, only if kernels can do that. wide_keys: see
// takes_wide_keys.
bool run_bwd(BwdParams& params, const Tensor& q, bool is_in_place, bool wide_keys) {
  if (q.is_cpu()) {
    if (!is_in_place) cpu::run_bwd(params, wide_keys);
    return !is_in_place;
  }
  const kernels::Launch launch = kernels::plan(params);
  check_served(launch.choice.why_none());
  if (is_in_place && !launch.can_overwrite_inputs) return false;
  run(launch, params, q);
  return true;
}

void run_rope(const RopeParams& params, const Tensor& x) {
  x.is_cpu() ? cpu::run_rope(params) : kernels::run_rope(params);
}

void run_rms_rope(const RmsRopeParams& params, const Tensor& x) {
  x.is_cpu() ? cpu::run_rms_rope(params) : kernels::run_rms_rope(params);
}

}  // namespace

void run_rope_jvp(const RopeJvpParams& params, const Tensor& x) {
  x.is_cpu() ? cpu::run_rope_jvp(params) : kernels::run_rope_jvp(params);
}

void run_rope_backward(const RopeBwdParams& params, const Tensor& x) {
  x.is_cpu() ? cpu::run_rope_backward(params) : kernels::run_rope_backward(params);
}

namespace {

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale,
                  const OptionalTensor& key_padding_mask, double dropout_p, const OptionalTensor& dropout_seed) {
  check_dense("q", q);
  check_dense("k", k);
  check_dense("v", v);
  check_rank("q", q, 4, "(batch_size, seqlen_q, num_heads, head_dim)");
  check_rank("k", k, 4, "(batch_size or 1, seqlen_k, num_heads, head_dim)");
  check_rank("v", v, 4, "(batch_size or 1, seqlen_k, num_heads, head_dim_v)");
  check_device("k", k, q.device(), "like q");
  check_device("v", v, q.device(), "like q");
  to_dtype("q", q.scalar_type());
  check_dtype("k", k, q.scalar_type(), "like q");
  check_dtype("v", v, q.scalar_type(), "like q");
  if (key_padding_mask) {
    check_dense("key_padding_mask", *key_padding_mask);
    check_device("key_padding_mask", *key_padding_mask, q.device(), "like q");
    check_dtype("key_padding_mask", *key_padding_mask, at::kBool, "(True = real token)");
    check_rank("key_padding_mask", *key_padding_mask, 2, "(batch_size or 1, seqlen_k)");
  }
  TORCH_CHECK_VALUE(std::isfinite(softmax_scale), "softmax_scale: expected a finite number, got ", softmax_scale);
  TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p <= 1, "dropout_p: expected a probability, got ", dropout_p);
  if (dropout_p > 0) {
    TORCH_CHECK_VALUE(dropout_seed.has_value(), "dropout_seed: expected an int64 tensor of shape (1,), got None");
    check_device("dropout_seed", *dropout_seed, q.device(), "like q");
    check_dtype("dropout_seed", *dropout_seed, at::kLong, "(the seed of Philox)");
    check_shape("dropout_seed", *dropout_seed, {1}, "(the seed of Philox)");
  }
  if (has_symbolic_sizes({&q, &k, &v}) || (key_padding_mask && has_symbolic_sizes({&*key_padding_mask}))) return;
  const int64_t batch_size = q.size(0), num_heads = q.size(2), head_dim = q.size(3);
  const int64_t batch_size_k = k.size(0) == 1 ? 1 : batch_size;
  check_shape("k", k, {batch_size_k, k.size(1), num_heads, head_dim}, "to match q");
  const int64_t batch_size_v = v.size(0) == 1 ? 1 : batch_size;
  check_shape("v", v, {batch_size_v, k.size(1), num_heads, v.size(3)}, "to match q and k");
  TORCH_CHECK_VALUE(head_dim > 0, "q: expected head_dim of at least 1, got ", q.sizes());
  TORCH_CHECK_VALUE(v.size(3) > 0, "v: expected head_dim of at least 1, got ", v.sizes());
  if (key_padding_mask) {
    const int64_t batch_size_mask = key_padding_mask->size(0) == 1 ? 1 : batch_size;
    check_shape("key_padding_mask", *key_padding_mask, {batch_size_mask, k.size(1)}, "to match q and k");
  }
}

std::shared_ptr<const Schedule> checked_schedule(at::IntArrayRef segments, const Tensor& q, const Tensor& k,
                                                 Pass pass) {
  try {
    const Walker walker = q.is_cuda() && kernels::are_there() ? Walker::kCuda : Walker::kCpu;
    return schedule_of(segments, q.size(1), k.size(1), pass, walker);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

}  // namespace

Call prepare(Pass pass, const Tensor& q, const Tensor& k, const Tensor& v, at::IntArrayRef segments,
             double softmax_scale, const OptionalTensor& key_padding_mask, double dropout_p,
             const OptionalTensor& dropout_seed) {
  check_inputs(q, k, v, softmax_scale, key_padding_mask, dropout_p, dropout_seed);
  check_memory("q", q);
  check_memory("k", k);
  check_memory("v", v);
  Call call{.q = last_dim_contiguous(q),
            .k = last_dim_contiguous(k),
            .v = last_dim_contiguous(v),
            .schedule = checked_schedule(segments, q, k, pass),
            .softmax_scale = std::abs(softmax_scale),
            .dropout_p = dropout_p,
            .negates_q = softmax_scale < 0};
  if (key_padding_mask) {
    check_memory("key_padding_mask", *key_padding_mask);
    call.key_padding_mask = last_dim_contiguous(*key_padding_mask);
  }
  if (dropout_p > 0) {
    check_memory("dropout_seed", *dropout_seed);
    call.dropout_seed = *dropout_seed;
  }
  call.q = call.like_q(call.q);
  return call;
}

Tensor Call::like_q(const Tensor& given) const {
  if (!negates_q) return given;
  const at::AutoDispatchBelowADInplaceOrView guard;
  return last_dim_contiguous(given.neg());
}

void Call::restore_like_q(const Tensor& made) const {
  if (!negates_q) return;
  const at::AutoDispatchBelowADInplaceOrView guard;
  made.neg_();
}

void fill(AttentionParams& params, const Call& call) {
  const Tensor &q = call.q, &k = call.k, &v = call.v;
  params.dtype = to_dtype("q", q.scalar_type());
  params.batch_size = q.size(0);
  params.num_heads = q.size(2);
  params.seqlen_q = q.size(1);
  params.seqlen_k = k.size(1);
  params.head_dim = q.size(3);
  params.head_dim_v = v.size(3);
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.q_strides = strides(q);
  params.k_strides = strides_broadcast(k, q.size(0));
  params.v_strides = strides_broadcast(v, q.size(0));
  if (call.key_padding_mask.defined()) {
    params.key_padding_mask = call.key_padding_mask.const_data_ptr<bool>();
    params.key_padding_mask_batch_stride = call.key_padding_mask.size(0) == 1 ? 0 : call.key_padding_mask.stride(0);
  }
  params.softmax_scale = call.softmax_scale;
  params.dropout_p = call.dropout_p;
  if (call.dropout_seed.defined()) params.dropout_seed = call.dropout_seed.const_data_ptr<int64_t>();
  params.schedule = call.schedule.get();
  fill_device(params, q);
}

void run_jvp(JvpParams& params, const Tensor& q) { q.is_cpu() ? cpu::run_jvp(params) : run_on_gpu(params, q); }

void run_bwd_jvp(BwdJvpParams& params, const Tensor& q) {
  q.is_cpu() ? cpu::run_bwd_jvp(params) : run_on_gpu(params, q);
}

Tensor sum_broadcast(const Tensor& grad, const Tensor& input) {
  return input.size(0) == grad.size(0) ? grad : grad.sum(0, true);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, at::IntArrayRef segments,
                                   double softmax_scale, const OptionalTensor& key_padding_mask, double dropout_p,
                                   const OptionalTensor& dropout_seed) {
  const Call call =
      prepare(Pass::kForward, q, k, v, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed);
  const c10::DeviceGuard guard(q.device());
  Tensor out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(lse_dtype(q)));
  FwdParams params{};
  fill(params, call);
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr();
  params.out_strides = strides(out);
  run_fwd(params, q);
  return {out, lse};
}

namespace {

// Beside what check_inputs checks. Gradients are given, or none.
void check_gradients(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& out, const Tensor& lse, at::TensorList grads) {
  const auto check = [&](const char* name, const Tensor& tensor, at::ScalarType dtype, int64_t rank,
                         const char* shape) {
    check_dense(name, tensor);
    check_device(name, tensor, q.device(), "like q");
    check_dtype(name, tensor, dtype, "to match q");
    check_rank(name, tensor, rank, shape);
  };
  check("dout", dout, q.scalar_type(), 4, "(batch_size, seqlen_q, num_heads, head_dim_v)");
  check("out", out, q.scalar_type(), 4, "(batch_size, seqlen_q, num_heads, head_dim_v)");
  check("lse", lse, lse_dtype(q), 3, "(batch_size, num_heads, seqlen_q)");
  if (dlse) check("dlse", *dlse, lse_dtype(q), 3, "(batch_size, num_heads, seqlen_q)");
  constexpr std::array names{"dq", "dk", "dv"};
  const bool wide_keys = grads.size() == 3 && takes_wide_keys(q) && grads[1].scalar_type() == at::kFloat;
  for (size_t i = 0; i < grads.size(); ++i) {
    check(names[i], grads[i], wide_keys && i > 0 ? at::kFloat : q.scalar_type(), 4,
          "of the input, for every sequence of the batch");
  }
  if (has_symbolic_sizes({&q, &k, &v, &dout, &out, &lse}) || (dlse && has_symbolic_sizes({&*dlse}))) return;
  const at::DimVector out_shape{q.size(0), q.size(1), q.size(2), v.size(3)};
  const at::DimVector lse_shape{q.size(0), q.size(2), q.size(1)};
  check_shape("dout", dout, out_shape, "to match the inputs");
  check_shape("out", out, out_shape, "to match the inputs");
  check_shape("lse", lse, lse_shape, "to match the inputs");
  if (dlse) check_shape("dlse", *dlse, lse_shape, "to match the inputs");
  const std::array<const Tensor*, 3> inputs{&q, &k, &v};
  for (size_t i = 0; i < grads.size(); ++i) {
    if (has_symbolic_sizes({&grads[i]})) return;
    at::DimVector shape(inputs[i]->sizes());
    shape[0] = q.size(0);
    check_shape(names[i], grads[i], shape, "to match the inputs");
    TORCH_CHECK_VALUE(grads[i].stride(3) == 1 || grads[i].size(3) == 1, names[i],
                      ": expected a last dim of stride 1, got strides ", grads[i].strides());
  }
}

// Whether it ran: where the gradients are the inputs themselves, only if kernels can do that. spare_out: as BwdParams
// has it.
bool run_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& out, const Tensor& lse, at::IntArrayRef segments, double softmax_scale,
                  const OptionalTensor& key_padding_mask, double dropout_p, const OptionalTensor& dropout_seed,
                  const Tensor& dq, const Tensor& dk, const Tensor& dv, bool is_in_place, bool may_overwrite_out) {
  const Call call =
      prepare(Pass::kBackward, q, k, v, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed);
  check_gradients(dout, dlse, q, k, v, out, lse, {dq, dk, dv});
  for (const auto& [name, tensor] :
       {Named{"dout", &dout}, {"out", &out}, {"lse", &lse}, {"dq", &dq}, {"dk", &dk}, {"dv", &dv}}) {
    check_memory(name, *tensor);
  }
  if (dlse) check_memory("dlse", *dlse);
  if (!is_in_place) {
    c10::SmallVector<Named, 9> read{{"q", &q}, {"k", &k}, {"v", &v}, {"dout", &dout}, {"out", &out}, {"lse", &lse}};
    if (dlse) read.emplace_back("dlse", &*dlse);
    if (key_padding_mask) read.emplace_back("key_padding_mask", &*key_padding_mask);
    if (dropout_p > 0) read.emplace_back("dropout_seed", &*dropout_seed);
    check_overlap({{"dq", &dq}, {"dk", &dk}, {"dv", &dv}}, read);
  }
  const c10::DeviceGuard guard(q.device());
  const Tensor dout_rows = last_dim_contiguous(dout), out_rows = last_dim_contiguous(out);
  const Tensor lse_rows = lse.contiguous(), dlse_rows = dlse ? dlse->contiguous() : Tensor();
  BwdParams params{};
  params.dq = dq.mutable_data_ptr();
  params.dk = dk.mutable_data_ptr();
  params.dv = dv.mutable_data_ptr();
  if (may_overwrite_out && out.is_contiguous()) params.spare_out = out.mutable_data_ptr();
  fill(params, call);
  params.out = out_rows.const_data_ptr();
  params.lse = lse_rows.const_data_ptr();
  params.dout = dout_rows.const_data_ptr();
  if (dlse) params.dlse = dlse_rows.const_data_ptr();
  params.out_strides = strides(out_rows);
  params.dout_strides = strides(dout_rows);
  params.dq_strides = strides(dq);
  params.dk_strides = strides(dk);
  params.dv_strides = strides(dv);
  params.deterministic = at::globalContext().deterministicAlgorithms();
  if (!run_bwd(params, q, is_in_place, dk.scalar_type() != q.scalar_type())) return false;
  call.restore_like_q(dq);
  return true;
}

bool is_same_memory(const Tensor& a, const Tensor& b) {
  if (!a.storage().is_alias_of(b.storage()) || a.storage_offset() != b.storage_offset()) return false;
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}

}  // namespace

void backward_out(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& out, const Tensor& lse, at::IntArrayRef segments, double softmax_scale,
                  const OptionalTensor& key_padding_mask, double dropout_p, const OptionalTensor& dropout_seed,
                  const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  run_backward(dout, dlse, q, k, v, out, lse, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed, dq,
               dk, dv, false, false);
}

bool backward_in_place(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
                       const Tensor& v, const Tensor& out, const Tensor& lse, at::IntArrayRef segments,
                       double softmax_scale, const OptionalTensor& key_padding_mask, double dropout_p,
                       const OptionalTensor& dropout_seed, bool may_overwrite_out) {
  for (const Tensor* each : {&q, &k, &v, &dout, &out, &lse}) {
    if (!each->is_cuda() || !is_resolved(*each)) return false;
  }
  if (softmax_scale < 0) return false;  // kernels read a copy of q, whose place dq is not to take meanwhile
  return run_backward(dout, dlse, q, k, v, out, lse, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed,
                      q, k, v, true, may_overwrite_out);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            at::IntArrayRef segments, double softmax_scale,
                                            const OptionalTensor& key_padding_mask, double dropout_p,
                                            const OptionalTensor& dropout_seed) {
  check_inputs(q, k, v, softmax_scale, key_padding_mask, dropout_p, dropout_seed);
  const int64_t batch_size = q.size(0);
  const Tensor dq = at::empty(q.sizes(), q.options());
  const Tensor dk = at::empty({batch_size, k.size(1), k.size(2), k.size(3)}, k.options());
  const Tensor dv = at::empty({batch_size, v.size(1), v.size(2), v.size(3)}, v.options());
  backward_out(dout, dlse, q, k, v, out, lse, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed, dq,
               dk, dv);
  return {dq, sum_broadcast(dk, k), sum_broadcast(dv, v)};
}

void check_rope(const Tensor& x, const Tensor& freqs, const Tensor& out) {
  check_dense("x", x);
  check_dense("freqs", freqs);
  check_dense("out", out);
  check_rank("x", x, 4, "(batch_size, seqlen, num_heads, head_dim)");
  to_dtype("x", x.scalar_type());
  check_device("freqs", freqs, x.device(), "like x");
  check_device("out", out, x.device(), "like x");
  check_dtype("freqs", freqs, x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat,
              "(fp64 for fp64 inputs, fp32 for all others)");
  check_dtype("out", out, x.scalar_type(), "like x");
  check_rank("freqs", freqs, 4, "(batch_size or 1, seqlen, head_dim / 2, 2)");
  if (has_symbolic_sizes({&x, &freqs, &out})) return;
  check_shape("out", out, x.sizes(), "like x");
  TORCH_CHECK_VALUE(x.size(3) % 2 == 0, "x: expected an even head_dim, got ", x.sizes());
  const int64_t batch_size_freqs = freqs.size(0) == 1 ? 1 : x.size(0);
  check_shape("freqs", freqs, {batch_size_freqs, x.size(1), x.size(3) / 2, 2}, "to match x");
  for (const auto& [name, tensor] : {Named{"x", &x}, {"out", &out}}) {
    TORCH_CHECK_VALUE(tensor->stride(3) == 1 || tensor->size(3) == 0, name,
                      ": expected a last dim of stride 1, got strides ", tensor->strides());
  }
}

Tensor fill(RopeParams& params, const Tensor& x, const OptionalTensor& freqs, bool conjugate) {
  params.dtype = to_dtype("x", x.scalar_type());
  params.batch_size = x.size(0);
  params.seqlen = x.size(1);
  params.num_heads = x.size(2);
  params.head_dim = x.size(3);
  params.x = x.const_data_ptr();
  params.x_strides = strides(x);
  params.conjugate = conjugate;
  fill_device(params, x);
  if (!freqs) return {};
  const Tensor rows = freqs->stride(3) == 1 && freqs->stride(2) == 2 ? *freqs : freqs->contiguous();
  params.freqs = rows.const_data_ptr();
  params.freqs_batch_stride = rows.size(0) == 1 ? 0 : rows.stride(0);
  params.freqs_row_stride = rows.stride(1);
  return rows;
}

namespace {

Tensor fill(RopeParams& params, const Tensor& x, const OptionalTensor& freqs, bool conjugate, const Tensor& out) {
  params.out = out.mutable_data_ptr();  // first: a lazy copy gets memory of its own by it
  params.out_strides = strides(out);
  return fill(params, x, freqs, conjugate);
}

}  // namespace

void rope_out(const Tensor& x, const Tensor& freqs, bool conjugate, const Tensor& out) {
  check_rope(x, freqs, out);
  for (const auto& [name, tensor] : {Named{"x", &x}, {"freqs", &freqs}, {"out", &out}}) check_memory(name, *tensor);
  c10::SmallVector<Named, 2> read{{"freqs", &freqs}};
  if (!is_same_memory(x, out)) read.emplace_back("x", &x);
  check_overlap({{"out", &out}}, read);
  const c10::DeviceGuard guard(x.device());
  RopeParams params{};
  const Tensor rows = fill(params, x, freqs, conjugate, out);
  run_rope(params, x);
}

Tensor rope(const Tensor& x, const Tensor& freqs, bool conjugate) {
  check_rank("x", x, 4, "(batch_size, seqlen, num_heads, head_dim)");
  const Tensor out = at::empty(x.sizes(), x.options());
  rope_out(last_dim_contiguous(x), freqs, conjugate, out);
  return out;
}

namespace {

// Whether there are numbers: on the meta device there are shapes alone.
bool check_rms_rope(const Tensor& x, const OptionalTensor& freqs, const Tensor& out) {
  if (freqs) check_rope(x, *freqs, out);
  if (x.is_meta()) return false;
  if (freqs) check_memory("freqs", *freqs);
  check_memory("x", x);
  return true;
}

}  // namespace

void rms_rope_out(const Tensor& x, const OptionalTensor& freqs, const Tensor& out) {
  if (!check_rms_rope(x, freqs, out)) return;
  const c10::DeviceGuard guard(x.device());
  RmsRopeParams params{};
  const Tensor rows = fill(params, x, freqs, false, out);
  run_rms_rope(params, x);
}

void rms_rope_backward(const Tensor& x, const OptionalTensor& freqs, const Tensor& grad) {
  if (!check_rms_rope(x, freqs, grad)) return;
  const c10::DeviceGuard guard(x.device());
  RmsRopeParams params{};
  const Tensor rows = fill(params, grad, freqs, true, grad);
  params.rows = x.const_data_ptr();
  params.rows_strides = strides(x);
  run_rms_rope(params, x);
}

bool cast_by_one_launch(at::TensorList from, at::TensorList to) {
  if (from.empty() || from.size() > static_cast<size_t>(cuda::CastParams::kMostTensors)) return false;
  const at::ScalarType dtype = to[0].scalar_type();
  if (!from[0].is_cuda() || (dtype != at::kHalf && dtype != at::kBFloat16)) return false;
  cuda::CastParams params{};
  for (size_t i = 0; i < from.size(); ++i) {
    if (from[i].scalar_type() != at::kFloat || !from[i].is_contiguous() || !to[i].is_contiguous() ||
        from[i].device() != from[0].device() || !is_resolved(from[i])) {
      return false;
    }
    check_memory("cast", from[i]);
    params.tensors[i] = {from[i].const_data_ptr(), to[i].mutable_data_ptr(), from[i].numel()};
  }
  const c10::DeviceGuard guard(from[0].device());
  params.num_tensors = static_cast<int>(from.size());
  params.dtype = to_dtype("to", dtype);
  params.stream = current_stream(from[0]);
  kernels::run_cast(params);
  return true;
}

Tensor sum_columns(const Tensor& rows) {
  if (!rows.is_cuda() || (rows.scalar_type() != at::kHalf && rows.scalar_type() != at::kBFloat16) ||
      !is_resolved(rows) || !kernels::are_there()) {
    return {};
  }
  constexpr int64_t kBytes = 16, kElements = kBytes / 2;
  const bool fits = rows.stride(1) == 1 && rows.size(1) % kElements == 0 && rows.stride(0) % kElements == 0 &&
                    reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % kBytes == 0;
  if (!fits) return {};
  check_memory("rows", rows);
  const c10::DeviceGuard guard(rows.device());
  Tensor sums = at::empty({rows.size(1)}, rows.options().dtype(at::kFloat));
  cuda::ColumnSumsParams params{};
  params.rows = rows.const_data_ptr();
  params.num_rows = rows.size(0);
  params.num_columns = rows.size(1);
  params.row_stride = rows.stride(0);
  params.dtype = to_dtype("rows", rows.scalar_type());
  params.sums = sums.mutable_data_ptr<float>();
  params.stream = current_stream(rows);
  kernels::run_column_sums(params);
  return sums;
}

void check_forward(const Tensor& q, const Tensor& k, const Tensor& v, c10::SymIntArrayRef segments,
                   double softmax_scale, const OptionalTensor& key_padding_mask, double dropout_p,
                   const OptionalTensor& dropout_seed) {
  check_inputs(q, k, v, softmax_scale, key_padding_mask, dropout_p, dropout_seed);
  const auto numbers = c10::asIntArrayRefSlowOpt(segments);
  if (numbers && !has_symbolic_sizes({&q, &k})) checked_schedule(*numbers, q, k, Pass::kForward);
}

void check_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Tensor& out, const Tensor& lse, c10::SymIntArrayRef segments, double softmax_scale,
                    const OptionalTensor& key_padding_mask, double dropout_p, const OptionalTensor& dropout_seed,
                    at::TensorList grads) {
  check_forward(q, k, v, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed);
  check_gradients(dout, dlse, q, k, v, out, lse, grads);
}

namespace {

template <class Params>
CudaLaunch described(const kernels::Launch<Params>& launch) {
  const cuda::Layout& layout = launch.layout;
  return {launch.choice.family, launch.choice.why, layout.tile_rows, layout.block_rows,
          layout.num_splits,    layout.num_tiles,  layout.num_slots, layout.num_split_tiles};
}

}  // namespace

std::pair<std::string, std::string> cuda_kernel(at::ScalarType dtype, int64_t head_dim, int64_t head_dim_v, int device,
                                                bool backward, bool tangents) {
  const cuda::Problem problem{to_dtype("dtype", dtype), head_dim, head_dim_v, device};
  if (!kernels::are_there()) return {"none", kernels::why_none()};
  const auto choose = tangents ? (backward ? kernels::choose<BwdJvpParams> : kernels::choose<JvpParams>)
                               : (backward ? kernels::choose<BwdParams> : kernels::choose<FwdParams>);
  const kernels::Choice choice = choose(problem);
  return {choice.family, choice.why};
}

CudaLaunch cuda_launch(at::ScalarType dtype, std::array<int64_t, 6> shape, at::IntArrayRef segments, int device,
                       bool backward, bool tangents) {
  TORCH_CHECK_NOT_IMPLEMENTED(kernels::are_there(), kernels::why_none());
  const auto [batch_size, num_heads, seqlen_q, seqlen_k, head_dim, head_dim_v] = shape;
  const auto schedule = kernels::make_schedule(segments.data(), segments.size(), seqlen_q, seqlen_k);
  kernels::add_inverse(*schedule);
  const auto contiguous = [heads = num_heads](int64_t seqlen, int64_t columns) {
    return Strides{seqlen * heads * columns, heads * columns, columns};
  };
  BwdJvpParams params{};
  params.dtype = to_dtype("dtype", dtype);
  params.batch_size = batch_size;
  params.num_heads = num_heads;
  params.seqlen_q = seqlen_q;
  params.seqlen_k = seqlen_k;
  params.head_dim = head_dim;
  params.head_dim_v = head_dim_v;
  params.q_strides = params.dq_strides = contiguous(seqlen_q, head_dim);
  params.k_strides = params.dk_strides = contiguous(seqlen_k, head_dim);
  params.v_strides = params.dv_strides = contiguous(seqlen_k, head_dim_v);
  params.out_strides = params.dout_strides = contiguous(seqlen_q, head_dim_v);
  params.softmax_scale = 1;
  params.schedule = schedule.get();
  params.device = device;
  params.allow_tf32 = allows_tf32();
  params.deterministic = at::globalContext().deterministicAlgorithms();
  params.tangents.count = 1;
  if (backward && tangents) return described(kernels::plan(params));
  if (backward) return described(kernels::plan(static_cast<const BwdParams&>(params)));
  JvpParams jvp{{static_cast<const AttentionParams&>(params)}};
  jvp.out_strides = jvp.out_dot_strides = params.out_strides;
  jvp.tangents = params.tangents;
  return tangents ? described(kernels::plan(jvp)) : described(kernels::plan(static_cast<const FwdParams&>(jvp)));
}

}  // namespace mixed_attention
