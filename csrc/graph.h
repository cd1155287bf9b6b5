// What our nodes of autograd's graph share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

namespace mixed_attention {

using OptionalTensors = std::vector<std::optional<at::Tensor>>;

inline std::optional<at::Tensor> optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

// What a node keeps from its forward to its backward beside tensors.
template <typename Value>
struct Kept : torch::CustomClassHolder {
  explicit Kept(Value given) : value(std::move(given)) {}

  static c10::IValue make(Value value) {
    return c10::IValue::make_capsule(c10::make_intrusive<Kept>(std::move(value)));
  }
  static const Value& of(const c10::IValue& kept) { return static_cast<const Kept&>(*kept.toCapsule()).value; }

  Value value;
};

// Whether a derivative itself is to be differentiated or mapped: then it may neither overwrite nor run kernels, which
// would answer a transform of functorch with zeros.
inline bool needs_composite(const std::vector<at::Tensor>& grads) {
  const auto is_transformed = [](const at::Tensor& grad) {
    return grad.defined() && (grad.key_set().has(c10::DispatchKey::Batched) || grad._fw_grad(/*level=*/0).defined());
  };
  return c10::GradMode::is_enabled() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         std::any_of(grads.begin(), grads.end(), is_transformed);
}

}  // namespace mixed_attention
