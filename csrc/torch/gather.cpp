#include "torch/gather.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "torch/autograd.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using SharedShards = std::shared_ptr<Shards>;

SumsComposite& sums_composite() {
  static SumsComposite composite;
  return composite;
}

// Rows are the first dimension of what travels.
std::vector<Tensor> tokens_first(std::vector<Tensor> tensors) {
  for (Tensor& each : tensors) each = each.transpose(0, 1);
  return tensors;
}

std::vector<Tensor> run_gather(at::TensorList parts, const std::optional<Ranges>& tokens, const Shards& shards) {
  std::vector<std::vector<Tensor>> rows;
  for (const Tensor& part : parts) {
    rows.emplace_back();
    const Ranges all{{0, part.size(1)}};
    for (const auto& [start, end] : tokens.value_or(all)) {
      rows.back().push_back(part.slice(1, start, end).transpose(0, 1));
    }
  }
  return tokens_first(finish_gather(start_gather(rows, shards), shards));
}

struct GatherState {
  std::optional<Ranges> tokens;
  int64_t num_tokens;
  SharedShards shards;
  std::shared_ptr<UnroundedGradients> unrounded;
};

// Adds up over ranks what gradients (batch_size, shards.whole, ...) were rounded from, or them.
InFlight start_sums_of(const variable_list& grads, UnroundedGradients& unrounded, const Shards& shards) {
  return start_sums(tokens_first(unrounded.take(grads).value_or(grads)), shards, grads[0].scalar_type());
}

struct GatherTokens : torch::autograd::Function<GatherTokens> {
  static variable_list forward(AutogradContext* ctx, at::TensorList parts, const std::optional<Ranges>& tokens,
                               const SharedShards& shards) {
    ctx->saved_data["state"] =
        Kept<GatherState>::make({tokens, parts[0].size(1), shards, std::make_shared<UnroundedGradients>()});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return run_gather(parts, tokens, *shards);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const WithoutAutocast no_autocast;
    const GatherState& state = Kept<GatherState>::of(ctx->saved_data["state"]);
    const bool differentiable = needs_composite(grads);
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!differentiable) guard.emplace();
    variable_list result = tokens_first(
        differentiable ? sums_composite()(tokens_first(grads), state.shards)
                       : finish_sums(start_sums_of(grads, *state.unrounded, *state.shards), *state.shards));
    if (state.tokens) {
      for (Tensor& each : result) each = put_back(each, *state.tokens, state.num_tokens);
    }
    result.resize(result.size() + 2);
    return result;
  }
};

}  // namespace

std::vector<Tensor> gather_tokens(const std::vector<Tensor>& parts, const std::optional<Ranges>& tokens,
                                  const SharedShards& shards) {
  if (c10::GradMode::is_enabled()) return GatherTokens::apply(at::TensorList(parts), tokens, shards);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return run_gather(parts, tokens, *shards);
}

Tensor UnroundedPlace::round(const Tensor& sums, at::ScalarType dtype) const {
  const Tensor gradient = sums.to(dtype);
  gradients->leave(output, gradient, sums);
  return gradient;
}

UnroundedPlace unrounded_place(const Tensor& whole) {
  const auto node = whole.grad_fn();
  if (const auto* gather = context_of<GatherTokens>(node.get())) {
    return {Kept<GatherState>::of(gather->saved_data.at("state")).unrounded, static_cast<uint32_t>(whole.output_nr())};
  }
  return {};
}

void set_sums_composite(SumsComposite composite) { sums_composite() = std::move(composite); }

}  // namespace mixed_attention
