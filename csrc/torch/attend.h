// The operator in plain eager mode: one node of the graph, and little host time.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#include "torch/autograd.h"
#include "torch/schedules.h"

namespace mixed_attention {

// What an attention computes, but for its tensors; as the operator takes it.
struct AttentionCall {
  std::shared_ptr<const FlatPlan> plan;
  double softmax_scale, dropout_p;

  const std::vector<int64_t>& segments() const { return plan->numbers(); }
};

// The forward operator, differentiable in q, k and v any number of times. Returns out and log-sum-exp.
std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const std::optional<at::Tensor>& key_padding_mask,
                                          const std::optional<at::Tensor>& dropout_seed, const AttentionCall& call);

// The gradients of q, k and v by functions that have derivatives themselves: what a second derivative goes through.
// saved: q, k, v, out, lse. needs_grad: of q, k and v; the others' gradients are nullopt.
using AttentionComposite = std::function<OptionalTensors(
    const std::vector<at::Tensor>& saved, const OptionalTensors& grads, const std::vector<bool>& needs_grad,
    const std::optional<at::Tensor>& key_padding_mask, const std::optional<at::Tensor>& dropout_seed,
    const AttentionCall& call)>;
void set_attention_composite(AttentionComposite composite);

}  // namespace mixed_attention
