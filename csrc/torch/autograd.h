// What our nodes of autograd's graph share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "torch/torch_internals.h"

namespace mixed_attention {

using OptionalTensors = std::vector<std::optional<at::Tensor>>;

inline std::optional<at::Tensor> optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

// What a node keeps from its forward to its backward beside tensors.
// NOTE: tensors are asked for first, before this and before any guard. Hooks of others run then, a whole recomputation
// among them, and they must find torch as they left it.
template <typename Value>
struct Kept : torch::CustomClassHolder {
  explicit Kept(Value given) : value(std::move(given)) {}

  static c10::IValue make(Value value) {
    return c10::IValue::make_capsule(c10::make_intrusive<Kept>(std::move(value)));
  }
  static Value& of(const c10::IValue& kept) { return static_cast<Kept&>(*kept.toCapsule()).value; }

  Value value;
};

// Whether a derivative itself is to be differentiated or mapped: then it may neither overwrite nor run kernels.
inline bool needs_composite(const std::vector<at::Tensor>& grads) {
  return c10::GradMode::is_enabled() || is_mapped() ||
         std::any_of(grads.begin(), grads.end(),
                     [](const at::Tensor& grad) { return grad.defined() && is_transformed(grad); });
}

// Knows of the memory that a node has saved whether the node may give it away, and whether it has. It is made while the
// node saves.
class SavedMemory {
 public:
  // Raises torch's own error in a node that is called again after it gave away what it needs. That happens where it
  // failed half way, for want of memory, say: otherwise the engine frees what a node saved and raises by itself.
  void check() const { TORCH_CHECK(!is_given_, backward_twice()); }

  // Whether this is the last call of the node, and no hook has seen what was saved and may hold it.
  template <class Function>
  bool may_be_given(const torch::autograd::AutogradContext* ctx) const {
    return !is_hooked_ && is_last_call<Function>(ctx);
  }

  void give() { is_given_ = true; }
  void take_back() { is_given_ = false; }

 private:
  // NOTE: hooks bring along tensors of their own, too, so that nobody could say who else holds the memory.
  bool is_hooked_ = are_saved_tensors_hooked();
  bool is_given_ = false;
};

// Whether nobody sees the memory of an output that a node has saved, beside what is saved and what came of it; a
// recorded cache might. Inputs have another number, which says nothing of who else holds them.
inline bool is_seen_by_nobody_else(const at::Tensor& unpacked) { return num_holders(unpacked) == 2; }

}  // namespace mixed_attention
