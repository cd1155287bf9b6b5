// What we ask of torch that is no documented part of its C++: one file to mend when torch changes. Each has a test
// (tests/tools/test_torch_internals.py), which fails where a release of torch answers otherwise.
#pragma once

#include <ATen/Functions.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace mixed_attention {

// What is in force around a call.

// Autocast casts nothing while one lives.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// The dtype that autocast casts to on such devices, if it is on.
inline std::optional<at::ScalarType> autocast_dtype(at::DeviceType device) {
  if (!at::autocast::is_autocast_enabled(device)) return {};
  return at::autocast::get_autocast_dtype(device);
}

// Whether a transform of functorch is active. Kernels would answer it with zeros.
inline bool is_mapped() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether Python sees every operation, as selective checkpointing does to keep results: then what was made must stay as
// it is, and be made by operations that return it, as one that writes elsewhere might be left out of a recomputation.
inline bool is_watched() { return c10::impl::dispatch_mode_enabled(); }

// Whether hooks are called for what nodes save here.
inline bool are_saved_tensors_hooked() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }

// The stream on which work for a tensor's device is queued, as CUDA knows it.
inline void* current_stream(const at::Tensor& tensor) {
  return c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device()).native_handle();
}

// What a tensor is.

inline bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

// Whether a tensor has a tangent, or stands for several as is_grads_batched makes them (is_mapped tells other batches).
inline bool is_transformed(const at::Tensor& tensor) {
  return tensor.key_set().has(c10::DispatchKey::Batched) || has_tangent(tensor);
}

// Whether a tensor is the numbers in its memory. NOTE: only operators may be called with what stands for others.
inline bool is_resolved(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kLazy{c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor,
                                      c10::DispatchKey::Python};
  return !tensor.key_set().has_any(kLazy);
}

// Sizes of a compiler may stand for many: what depends on them is checked where they are numbers, in front of kernels.
inline bool has_symbolic_sizes(std::initializer_list<const at::Tensor*> tensors) {
  for (const at::Tensor* each : tensors) {
    if (each->unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return true;
  }
  return false;
}

// A tensor of torch's own class; others may have functions of their own, and are none here.
inline std::optional<at::Tensor> plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return {};
  return THPVariable_Unpack(object);
}

// How often a tensor has been written, as those see it who have saved it.
inline int64_t version_of(const at::Tensor& tensor) { return tensor._version(); }
inline void bump_version(const at::Tensor& tensor) { torch::autograd::impl::bump_version(tensor); }

// Its memory: how many tensors and nodes hold it, and giving it back while they do.
inline size_t num_holders(const at::Tensor& tensor) { return tensor.storage().use_count(); }
inline void release_memory(const at::Tensor& tensor) { tensor.storage().unsafeGetStorageImpl()->release_resources(); }

// Copies each tensor over its counterpart, by few launches.
inline void copy_all(at::TensorList to, at::TensorList from) { at::_foreach_copy_(to, from); }

// Operators.

// A collective over ranks that returns a new tensor; the compiler knows these.
inline c10::OperatorHandle collective_operator(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("_c10d_functional::" + name).c_str(), "");
}

inline bool has_kernel(const c10::OperatorHandle& op, const at::Tensor& tensor) {
  return op.hasKernelForDispatchKey(tensor.options().computeDispatchKey());
}

// What stands before an operator goes on with the call: behind derivatives, and behind the versions of tensors.
inline void redispatch_below_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                      torch::jit::Stack* stack) {
  const at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}
inline void redispatch_below_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                      torch::jit::Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

// The graph.

// Where gradients of a tensor go, and a tensor whose gradients go there.
inline torch::autograd::Edge gradient_edge(const at::Tensor& tensor) {
  return torch::autograd::impl::gradient_edge(tensor);
}
inline void set_gradient_edge(const at::Tensor& tensor, const torch::autograd::Edge& edge) {
  torch::autograd::impl::set_gradient_edge(tensor, edge);
}

// What a node of a function has kept, or null if it is another's.
template <class Function>
torch::autograd::AutogradContext* context_of(torch::autograd::Node* node) {
  auto* found = dynamic_cast<torch::autograd::CppNode<Function>*>(node);
  return found == nullptr ? nullptr : &found->ctx_;
}

// Whether the engine calls a node of a function for the last time: in a backward that does not keep the graph. A call
// by hand says nothing of that, whatever backward it lies in. A hook of the node itself may call the node by hand, or
// fail after the node is done, so that it is called again.
template <class Function>
bool is_last_call(const torch::autograd::AutogradContext* ctx) {
  if (torch::autograd::get_current_graph_task_keep_graph()) return false;
  const auto node = torch::autograd::get_current_node();
  return context_of<Function>(node.get()) == ctx && node->pre_hooks().empty() && node->tensor_pre_hooks().empty() &&
         node->post_hooks().empty();
}

// Torch's error in a node that is called again after it gave away what it needs.
inline const char* backward_twice() { return torch::autograd::ERR_BACKWARD_TWICE; }

}  // namespace mixed_attention
