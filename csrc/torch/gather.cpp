#include "torch/gather.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "torch/autograd.h"
#include "torch/rotate.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using SharedShards = std::shared_ptr<Shards>;

GatherComposites& composites() {
  static GatherComposites found;
  return found;
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
};

struct GatherTokens : torch::autograd::Function<GatherTokens> {
  static variable_list forward(AutogradContext* ctx, at::TensorList parts, const std::optional<Ranges>& tokens,
                               const SharedShards& shards) {
    ctx->saved_data["state"] = Kept<GatherState>::make({tokens, parts[0].size(1), shards});
    const at::AutoDispatchBelowADInplaceOrView guard;
    return run_gather(parts, tokens, *shards);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const GatherState& state = Kept<GatherState>::of(ctx->saved_data["state"]);
    const bool differentiable = needs_composite(grads);
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!differentiable) guard.emplace();
    const variable_list wholes = tokens_first(grads);
    variable_list result = tokens_first(differentiable ? composites().sums(wholes, state.shards)
                                                       : finish_sums(start_sums(wholes, *state.shards), *state.shards));
    if (state.tokens) {
      for (Tensor& each : result) each = put_back(each, *state.tokens, state.num_tokens);
    }
    result.resize(result.size() + 2);
    return result;
  }
};

}  // namespace

// What two nodes share, of which one is done when the other begins.
struct TravellingKeys::Transfer {
  LocalKeys keys;
  SharedShards shards;
  std::optional<InFlight> gather, sums;

  // Rows are the first dimension of what travels.
  Tensor rows(const Tensor& buffer) const { return buffer.view(keys.shape).transpose(0, 1); }
  // The inverse, contiguous, as rotating it where it lies wants it. NOTE: no size is left open, which nobody could tell
  // of a rank without tokens.
  Tensor buffer(const Tensor& rows) const {
    const auto& shape = keys.shape;
    return rows.transpose(0, 1).contiguous().view({shape[0], shape[1], shape[2] * shape[3] * shape[4]});
  }
};

namespace {

using SharedTransfer = std::shared_ptr<TravellingKeys::Transfer>;

Tensor rotate_and_start(const Tensor& buffer, const std::optional<Tensor>& pairs, TravellingKeys::Transfer& transfer) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const LocalKeys& keys = transfer.keys;
  Tensor here = buffer;
  if (pairs) {
    if (is_seen(buffer)) {
      here = rotate_copy(buffer, keys.shape, 1, *pairs, keys.tokens);
    } else {
      rotate_in_place(buffer, keys.shape, 1, *pairs, keys.tokens, /*conjugate=*/false);
    }
  }
  transfer.gather = start_gather({{transfer.rows(here)}}, *transfer.shards);
  return here;
}

Tensor wait_for_whole(TravellingKeys::Transfer& transfer) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor whole = finish_gather(*transfer.gather, *transfer.shards)[0].transpose(0, 1);
  transfer.gather.reset();
  return whole;
}

// In the backward, waits for the sums.
struct StartGather : torch::autograd::Function<StartGather> {
  static Tensor forward(AutogradContext* ctx, const Tensor& buffer, const std::optional<Tensor>& pairs,
                        const SharedTransfer& transfer) {
    const Tensor here = rotate_and_start(buffer, pairs, *transfer);
    if (pairs && here.is_same(buffer)) ctx->mark_dirty({buffer});
    ctx->save_for_backward({pairs.value_or(Tensor())});
    ctx->saved_data["transfer"] = Kept<SharedTransfer>::make(transfer);
    ctx->set_materialize_grads(false);
    return here;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    TravellingKeys::Transfer& transfer = *Kept<SharedTransfer>::of(ctx->saved_data["transfer"]);
    const LocalKeys& keys = transfer.keys;
    const Tensor &pairs = saved[0], &more = grads[0];  // the gradient of what a cache has recorded, say
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    const bool in_place = transfer.sums && !needs_composite(grads);
    if (in_place) guard.emplace();
    Tensor grad = more;  // without sums all of it: the other node has made differentiable ones, or was not asked
    if (const auto sums = std::exchange(transfer.sums, std::nullopt)) {
      grad = transfer.buffer(finish_sums(*sums, *transfer.shards)[0]);
      if (more.defined()) grad = in_place ? grad.add_(more) : grad + more;
    }
    if (!grad.defined() || !pairs.defined()) return {grad, {}, {}};
    if (!in_place) return {composites().rotate_back(grad, pairs, keys.tokens, keys.shape), {}, {}};
    rotate_in_place(grad, keys.shape, 1, pairs, keys.tokens, /*conjugate=*/true);
    return {grad, {}, {}};
  }
};

// Waits for the gather; in the backward, starts the sums.
struct FinishGather : torch::autograd::Function<FinishGather> {
  static Tensor forward(AutogradContext* ctx, const Tensor& /*here*/, const SharedTransfer& transfer) {
    ctx->saved_data["transfer"] = Kept<SharedTransfer>::make(transfer);
    return wait_for_whole(*transfer);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TravellingKeys::Transfer& transfer = *Kept<SharedTransfer>::of(ctx->saved_data["transfer"]);
    const Tensor rows = grads[0].transpose(0, 1);
    transfer.sums.reset();  // of a backward that failed half way
    if (needs_composite(grads)) {
      return {transfer.buffer(composites().sums({rows}, transfer.shards)[0]), {}};
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    transfer.sums = start_sums({rows}, *transfer.shards);
    return {{}, {}};  // the sums are not there yet: the other node waits for them
  }
};

}  // namespace

std::vector<Tensor> gather_tokens(const std::vector<Tensor>& parts, const std::optional<Ranges>& tokens,
                                  const SharedShards& shards) {
  if (c10::GradMode::is_enabled()) return GatherTokens::apply(at::TensorList(parts), tokens, shards);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return run_gather(parts, tokens, *shards);
}

TravellingKeys::TravellingKeys(const Tensor& buffer, const std::optional<Tensor>& pairs, const LocalKeys& keys,
                               SharedShards shards)
    : transfer_(std::make_shared<Transfer>(Transfer{keys, std::move(shards), {}, {}})) {
  if (c10::GradMode::is_enabled()) {
    here_ = StartGather::apply(buffer, pairs, transfer_);
  } else {
    here_ = rotate_and_start(buffer, pairs, *transfer_);
    if (pairs && here_.is_same(buffer) && !buffer.is_inference()) torch::autograd::impl::bump_version(buffer);
  }
}

Tensor TravellingKeys::wait() {
  return c10::GradMode::is_enabled() ? FinishGather::apply(here_, transfer_) : wait_for_whole(*transfer_);
}

void set_gather_composites(GatherComposites given) { composites() = std::move(given); }

}  // namespace mixed_attention
