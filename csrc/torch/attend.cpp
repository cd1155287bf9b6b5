#include "torch/attend.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/call.h"
#include "torch/dispatched.h"
#include "torch/gather.h"
#include "torch/ops.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

AttentionComposite& attention_composite() {
  static AttentionComposite composite;
  return composite;
}

std::tuple<Tensor, Tensor> run_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const std::optional<Tensor>& key_padding_mask,
                                       const std::optional<Tensor>& dropout_seed, const AttentionCall& call) {
  const auto& op = dispatched<&mixed_attention::forward>("mixed_attention::forward");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(q, k, v, call.segments(), call.softmax_scale, key_padding_mask, call.dropout_p, dropout_seed);
}

struct OperatorState {
  AttentionCall call;
  UnroundedPlace k, v;  // of keys of all ranks, whose gradients these add up

  bool leaves_sums() const { return k.gradients && v.gradients; }
};

struct Attend : torch::autograd::Function<Attend> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& dropout_seed,
                               const AttentionCall& call) {
    const auto [out, lse] = run_forward(q, k, v, key_padding_mask, dropout_seed, call);
    ctx->save_for_backward({q, k, v, out, lse, key_padding_mask.value_or(Tensor()), dropout_seed.value_or(Tensor())});
    OperatorState state{call, {}, {}};
    if (takes_wide_keys(q)) state = {call, unrounded_place(k), unrounded_place(v)};
    ctx->saved_data["state"] = Kept<OperatorState>::make(std::move(state));
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    const std::optional<Tensor> mask = optional_tensor(saved[5]), seed = optional_tensor(saved[6]);
    const OperatorState& state = Kept<OperatorState>::of(ctx->saved_data["state"]);
    const AttentionCall& call = state.call;
    variable_list result(6);
    // A second derivative comes by here on its way from the saved results, which have no gradients of their own there.
    if (!grads[0].defined() && !grads[1].defined()) return result;
    if (needs_composite(grads)) {
      const std::vector<bool> needs_grad{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
      const OptionalTensors dqkv = attention_composite()(
          {q, k, v, out, lse}, {optional_tensor(grads[0]), optional_tensor(grads[1])}, needs_grad, mask, seed, call);
      for (size_t i = 0; i < dqkv.size(); ++i) result[i] = dqkv[i].value_or(Tensor());
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor dout = grads[0].defined() ? grads[0] : at::zeros_like(out);
    if (state.leaves_sums()) {
      const auto& into = dispatched<&mixed_attention::backward_out>("mixed_attention::backward_out");
      const auto sums_of = [&](const Tensor& keys) {
        return at::empty({q.size(0), keys.size(1), keys.size(2), keys.size(3)}, keys.options().dtype(at::kFloat));
      };
      const Tensor dk = sums_of(k), dv = sums_of(v);
      result[0] = at::empty(q.sizes(), q.options());
      into.call(dout, optional_tensor(grads[1]), q, k, v, out, lse, call.segments(), call.softmax_scale, mask,
                call.dropout_p, seed, result[0], dk, dv);
      result[1] = state.k.round(sum_broadcast(dk, k), k.scalar_type());
      result[2] = state.v.round(sum_broadcast(dv, v), v.scalar_type());
      return result;
    }
    const auto& op = dispatched<&mixed_attention::backward>("mixed_attention::backward");
    std::tie(result[0], result[1], result[2]) =
        op.call(dout, optional_tensor(grads[1]), q, k, v, out, lse, call.segments(), call.softmax_scale, mask,
                call.dropout_p, seed);
    return result;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const std::optional<Tensor>& key_padding_mask,
                                  const std::optional<Tensor>& dropout_seed, const AttentionCall& call) {
  if (!c10::GradMode::is_enabled() || !(q.requires_grad() || k.requires_grad() || v.requires_grad())) {
    return run_forward(q, k, v, key_padding_mask, dropout_seed, call);
  }
  const variable_list results = Attend::apply(q, k, v, key_padding_mask, dropout_seed, call);
  return {results[0], results[1]};
}

void set_attention_composite(AttentionComposite composite) { attention_composite() = std::move(composite); }

}  // namespace mixed_attention
