#include "torch/tested_internals.h"

#include <ATen/Functions.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <string>
#include <vector>

#include "torch/autograd.h"
#include "torch/torch_internals.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
namespace py = pybind11;

// A function of Python's that may be let go of where the GIL is not held, as the engine does.
struct Told {
  py::function call;

  explicit Told(const py::function& call) : call(call) {}
  Told(const Told&) = delete;
  ~Told() {
    const py::gil_scoped_acquire gil;
    call = py::function();
  }
};

// A copy. Its node tells a function of Python's whether it is called for the last time.
struct Telling : torch::autograd::Function<Telling> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const py::function& tell) {
    ctx->saved_data["tell"] = Kept<std::shared_ptr<Told>>::make(std::make_shared<Told>(tell));
    return x.clone();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool is_last = is_last_call<Telling>(ctx);
    const py::gil_scoped_acquire gil;
    Kept<std::shared_ptr<Told>>::of(ctx->saved_data["tell"])->call(is_last);
    return {grads[0], Tensor()};
  }
};

// A tensor of such numbers whose gradient goes where that of x does.
Tensor stand_in(const Tensor& x, const Tensor& numbers) {
  const Tensor result = numbers.detach();
  set_gradient_edge(result, gradient_edge(x));
  return result;
}

Tensor mm_without_autocast(const Tensor& a, const Tensor& b) {
  const WithoutAutocast no_autocast;
  return at::mm(a, b);
}

}  // namespace

void define_tested_internals(py::module_& module) {
  py::module_ m = module.def_submodule("torch_internals", "What is asked of torch without a documented name.");
  m.def("autocast_dtype", [](const Tensor& x) { return autocast_dtype(x.device().type()); });
  m.def("mm_without_autocast", &mm_without_autocast);
  m.def("is_mapped", &is_mapped);
  m.def("is_watched", &is_watched);
  m.def("are_saved_tensors_hooked", &are_saved_tensors_hooked);
  m.def("current_stream", [](const Tensor& x) { return reinterpret_cast<intptr_t>(current_stream(x)); });
  m.def("has_tangent", &has_tangent);
  m.def("is_transformed", &is_transformed);
  m.def("is_resolved", &is_resolved);
  m.def("has_symbolic_sizes", [](const Tensor& x) { return has_symbolic_sizes({&x}); });
  m.def("is_plain", [](const py::handle& object) { return plain_tensor(object.ptr()).has_value(); });
  m.def("version_of", &version_of);
  m.def("bump_version", &bump_version);
  m.def("num_holders", &num_holders);
  m.def("release_memory", &release_memory);
  m.def("copy_all", [](const variable_list& to, const variable_list& from) { copy_all(to, from); });
  m.def("has_collective", [](const std::string& name) { return collective_operator(name).hasSchema(); });
  m.def("has_kernel", [](const char* name, const Tensor& x) {
    return has_kernel(c10::Dispatcher::singleton().findSchemaOrThrow(name, ""), x);
  });
  m.def("stand_in", &stand_in);
  m.def("telling", [](const Tensor& x, const py::function& tell) { return Telling::apply(x, tell); });
  m.def("is_telling", [](const Tensor& x) { return context_of<Telling>(x.grad_fn().get()) != nullptr; });
  m.def("backward_twice", &backward_twice);
}

}  // namespace mixed_attention
