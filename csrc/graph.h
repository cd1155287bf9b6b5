// What our nodes of autograd's graph share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace mixed_attention {

using OptionalTensors = std::vector<std::optional<at::Tensor>>;

inline std::optional<at::Tensor> optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

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
