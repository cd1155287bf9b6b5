// Registers the operators with torch's dispatcher and names the module. Fakes and derivatives: mixed_attention/ops.py.
#include <c10/core/GradMode.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <memory>
#include <string>

#include "cpu/launch.h"
#include "environment.h"
#include "kernels.h"
#include "torch/attend.h"
#include "torch/attend_in_place.h"
#include "torch/checks.h"
#include "torch/derivatives.h"
#include "torch/gather.h"
#include "torch/layer.h"
#include "torch/ops.h"
#include "torch/project.h"
#include "torch/rope_derivatives.h"
#include "torch/schedules.h"
#include "torch/tested_internals.h"
#include "torch/torch_internals.h"

namespace {

// Stands before operators whose results are not differentiable: refuses to be asked for a derivative instead of
// answering zero.
void refuse_derivatives(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (!argument.isTensor()) continue;
    const at::Tensor& tensor = argument.toTensor();
    TORCH_CHECK_NOT_IMPLEMENTED(
        !(tensor.requires_grad() && c10::GradMode::is_enabled()) && !mixed_attention::has_tangent(tensor),
        op.schema().name(),
        " has no derivative; use mixed_attention.attention and mixed_attention.apply_rope, which do");
  }
  mixed_attention::redispatch_below_autograd(op, keys, stack);
}

// Stands before operators that write into what they are given: whoever has saved such a tensor is to know.
void bump_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!arguments[i].alias_info() || !arguments[i].alias_info()->isWrite()) continue;
    written.push_back(values[i].toTensor());
    TORCH_CHECK_VALUE(!written.back().is_neg(), arguments[i].name(),
                      ": expected the memory of numbers, got a view that stands for their negatives");
  }
  mixed_attention::redispatch_below_versions(op, keys, stack);
  for (const at::Tensor& each : written) mixed_attention::bump_version(each);
}

// Stands wherever there are no kernels, and says which argument has led there.
void refuse_place(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string places = mixed_attention::kernels::are_there()
                                 ? "the CPU or a GPU"
                                 : "the CPU (" + mixed_attention::kernels::why_none() + ")";
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  const auto for_each_tensor = [&](const auto& check) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (values[i].isTensor()) check(arguments[i].name().c_str(), values[i].toTensor());
    }
  };
  for_each_tensor([](const char* name, const at::Tensor& tensor) { mixed_attention::check_dense(name, tensor); });
  for_each_tensor([&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_NOT_IMPLEMENTED(mixed_attention::has_kernel(op, tensor), name, ": expected a tensor on ", places,
                                ", got ", tensor.device(), "; mixed_attention.reference.attention computes it");
  });
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(), ": no kernel for tensors of these kinds");
}

using mixed_attention::plain_tensor;
using OptionalTensor = std::optional<at::Tensor>;

// The tensors of a layer as they come from Python. maps: weight and bias each, of the output projection at last.
struct LayerTensors {
  OptionalTensor x, freqs, key_padding_mask;
  mixed_attention::LinearMaps in, out;
};

// None where one is not of torch's own class.
std::optional<LayerTensors> layer_tensors(const py::handle& x, const py::list& maps, const py::handle& freqs,
                                          const py::handle& key_padding_mask) {
  LayerTensors found{plain_tensor(x.ptr()), plain_tensor(freqs.ptr()), plain_tensor(key_padding_mask.ptr()), {}, {}};
  if (!found.x || !(found.freqs || freqs.is_none()) || !(found.key_padding_mask || key_padding_mask.is_none())) {
    return {};
  }
  for (size_t i = 0; i < maps.size(); ++i) {
    const py::tuple map = maps[i];
    const OptionalTensor weight = plain_tensor(map[0].ptr()), bias = plain_tensor(map[1].ptr());
    if (!weight || !(bias || map[1].is_none())) return {};
    mixed_attention::LinearMaps& into = i + 1 < maps.size() ? found.in : found.out;
    into.weights.push_back(*weight);
    into.biases.push_back(bias);
  }
  return found;
}

std::optional<std::vector<at::Tensor>> run_layer(const py::handle& x, const py::list& maps, const py::handle& freqs,
                                                 const py::handle& key_padding_mask,
                                                 const mixed_attention::LayerCall& call) {
  const auto given = layer_tensors(x, maps, freqs, key_padding_mask);
  if (!given) return {};
  const py::gil_scoped_release no_gil;
  return mixed_attention::run_layer(*given->x, given->in, given->out, given->freqs, given->key_padding_mask, call);
}

std::optional<std::vector<at::Tensor>> run_layer_over_ranks(const py::handle& x, const py::list& maps,
                                                            const py::handle& freqs,
                                                            const mixed_attention::SpreadLayerCall& call) {
  const auto given = layer_tensors(x, maps, freqs, py::none());
  if (!given) return {};
  const py::gil_scoped_release no_gil;
  return mixed_attention::run_layer_over_ranks(*given->x, given->in, given->out, given->freqs, call);
}

// A function of Python's that C++ calls. NOTE: never freed, because static objects outlive the interpreter.
template <class Result>
auto from_python(const py::function& function) {
  auto* held = new py::function(function);
  return [held](const auto&... arguments) {
    const py::gil_scoped_acquire gil;
    return (*held)(arguments...).template cast<Result>();
  };
}

}  // namespace

TORCH_LIBRARY(mixed_attention, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, SymInt[] segments, float softmax_scale, Tensor? key_padding_mask=None, "
      "float dropout_p=0., Tensor? dropout_seed=None) -> (Tensor out, Tensor lse)");
  m.def(
      "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt[] segments, "
      "float softmax_scale, Tensor? key_padding_mask=None, float dropout_p=0., Tensor? dropout_seed=None) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "backward_out(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "SymInt[] segments, float softmax_scale, Tensor? key_padding_mask, float dropout_p, Tensor? dropout_seed, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  m.def(
      "forward_jvp(Tensor q, Tensor k, Tensor v, Tensor? q_dot, Tensor? k_dot, Tensor? v_dot, SymInt[] segments, "
      "float softmax_scale, Tensor? key_padding_mask=None, float dropout_p=0., Tensor? dropout_seed=None) "
      "-> (Tensor out, Tensor lse, Tensor out_dot, Tensor lse_dot)");
  m.def(
      "jvp(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? q_dot, Tensor? k_dot, Tensor? v_dot, "
      "SymInt[] segments, float softmax_scale, Tensor? key_padding_mask=None, float dropout_p=0., "
      "Tensor? dropout_seed=None) -> (Tensor out_dot, Tensor lse_dot)");
  m.def(
      "backward_jvp(Tensor dout_dot, Tensor? dlse_dot, Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor? q_dot, Tensor? k_dot, Tensor? v_dot, Tensor out_dot, Tensor lse_dot, "
      "SymInt[] segments, float softmax_scale, Tensor? key_padding_mask=None, float dropout_p=0., "
      "Tensor? dropout_seed=None, bool wants_dq_dot=False) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_dot)");
  m.def("rope(Tensor x, Tensor freqs, bool conjugate) -> Tensor");
  m.def("rope_out(Tensor x, Tensor freqs, bool conjugate, Tensor(a!) out) -> ()");
  m.def(
      "rope_jvp(Tensor x, Tensor freqs, Tensor? x_dot, Tensor? freqs_dot, bool conjugate, bool wants_out=True) "
      "-> (Tensor out, Tensor out_dot)");
  m.def(
      "rope_backward(Tensor? dout, Tensor? dout_dot, Tensor x, Tensor freqs, Tensor? x_dot, Tensor? freqs_dot, "
      "bool conjugate, bool[4] wanted) -> (Tensor dx, Tensor dfreqs, Tensor dx_dot, Tensor dfreqs_dot)");
}

namespace {

constexpr std::array kNames{"forward",      "backward", "backward_out", "forward_jvp", "jvp",
                            "backward_jvp", "rope",     "rope_out",     "rope_jvp",    "rope_backward"};

void implement(torch::Library& m) {
  m.impl("forward", &mixed_attention::forward);
  m.impl("backward", &mixed_attention::backward);
  m.impl("backward_out", &mixed_attention::backward_out);
  m.impl("rope", &mixed_attention::rope);
  m.impl("rope_out", &mixed_attention::rope_out);
  m.impl("rope_jvp", &mixed_attention::rope_jvp);
  m.impl("rope_backward", &mixed_attention::rope_backward);
}

void refuse(torch::Library& m) {
  for (const char* name : kNames) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_place>());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(mixed_attention, CPU, m) {
  implement(m);
  m.impl("forward_jvp", &mixed_attention::forward_jvp);
  m.impl("jvp", &mixed_attention::jvp);
  m.impl("backward_jvp", &mixed_attention::backward_jvp);
}

// Those of tangents are registered by mixed_attention/ops.py, which composes what no kernel serves.
TORCH_LIBRARY_IMPL(mixed_attention, CUDA, m) {
  if (mixed_attention::kernels::are_there()) implement(m);
}

namespace {

void open_kernels(const std::string& path) {
  if (mixed_attention::kernels::are_there()) return;
  mixed_attention::kernels::open(path);
  static auto* registered = new auto(MAKE_TORCH_LIBRARY_IMPL(mixed_attention, CUDA));  // for as long as the process is
  implement(*registered);
}

}  // namespace

TORCH_LIBRARY_IMPL(mixed_attention, CompositeExplicitAutograd, m) { refuse(m); }
TORCH_LIBRARY_IMPL(mixed_attention, NestedTensorCPU, m) { refuse(m); }
TORCH_LIBRARY_IMPL(mixed_attention, NestedTensorCUDA, m) { refuse(m); }

TORCH_LIBRARY_IMPL(mixed_attention, ADInplaceOrView, m) {
  for (const char* name : {"backward_out", "rope_out"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&bump_versions>());
  }
}

TORCH_LIBRARY_IMPL(mixed_attention, Autograd, m) {
  for (const char* name :
       {"backward", "backward_out", "jvp", "backward_jvp", "rope", "rope_out", "rope_jvp", "rope_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives>());
  }
}

namespace {

// What this build is and what it would do.
void define_questions(py::module_& m) {
  m.attr("build_flags") = "torch " TORCH_VERSION ", compiler " __VERSION__;
  m.def("has_cuda_kernels", &mixed_attention::kernels::are_there, "Whether there are CUDA kernels, linked or opened.");
  m.def("open_kernels", &open_kernels, py::arg("path"),
        "Opens a library of CUDA kernels, unless there are some; raises RuntimeError where that cannot be.");
  m.def("why_no_kernels", &mixed_attention::kernels::why_none, "Why there are no CUDA kernels.");
  m.def("set_why_no_kernels", &mixed_attention::kernels::set_why_none, py::arg("why"),
        "What errors are to say where there are no CUDA kernels.");
  m.def("cpu_instruction_set", &mixed_attention::cpu::instruction_set, "Instruction set of the CPU kernels here.");
  m.def(
      "check_environment",
      [] {
        mixed_attention::cpu::instruction_set();
        mixed_attention::asks_for_portable_gpu_kernels();
      },
      "Raises ValueError where MIXED_ATTENTION_CPU or MIXED_ATTENTION_GPU asks for what there is not.");
  m.def("cuda_kernel", &mixed_attention::cuda_kernel, py::arg("dtype"), py::arg("head_dim"), py::arg("head_dim_v"),
        py::arg("device"), py::arg("backward"), py::arg("tangents") = false,
        "Family of the CUDA kernels for a problem, and why no faster one.");
  m.def(
      "cuda_launch",
      [](at::ScalarType dtype, std::array<int64_t, 6> shape, const std::vector<int64_t>& segments, int device,
         bool backward,
         bool tangents) { return mixed_attention::cuda_launch(dtype, shape, segments, device, backward, tangents); },
      py::arg("dtype"), py::arg("shape"), py::arg("segments"), py::arg("device"), py::arg("backward"),
      py::arg("tangents") = false,
      "How the CUDA kernels serve a call: family, why no faster one, and its tiles: rows, rows taken up at a time, "
      "parts, number, at a time, cut.");
}

// What operators refuse, where nothing is to be computed.
void define_checks(py::module_& m) {
  using Segments = std::vector<c10::SymInt>;
  m.def(
      "check_forward",
      [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Segments& segments, double softmax_scale,
         const OptionalTensor& key_padding_mask, double dropout_p, const OptionalTensor& dropout_seed) {
        mixed_attention::check_forward(q, k, v, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("segments"), py::arg("softmax_scale"),
      py::arg("key_padding_mask"), py::arg("dropout_p"), py::arg("dropout_seed"),
      "Throws what the forward operator would throw, without computing.");
  m.def(
      "check_backward",
      [](const at::Tensor& dout, const OptionalTensor& dlse, const at::Tensor& q, const at::Tensor& k,
         const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse, const Segments& segments,
         double softmax_scale, const OptionalTensor& key_padding_mask, double dropout_p,
         const OptionalTensor& dropout_seed, const std::vector<at::Tensor>& grads) {
        mixed_attention::check_backward(dout, dlse, q, k, v, out, lse, segments, softmax_scale, key_padding_mask,
                                        dropout_p, dropout_seed, grads);
      },
      py::arg("dout"), py::arg("dlse"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
      py::arg("segments"), py::arg("softmax_scale"), py::arg("key_padding_mask"), py::arg("dropout_p"),
      py::arg("dropout_seed"), py::arg("grads"), "Throws what the backward operators would throw, without computing.");
  m.def("forward_jvp", &mixed_attention::forward_jvp, "The operator, by kernels.");
  m.def("jvp", &mixed_attention::jvp, "The operator, by kernels.");
  m.def("backward_jvp", &mixed_attention::backward_jvp, "The operator, by kernels.");
  m.def("check_jvp", &mixed_attention::check_jvp, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
        py::arg("lse"), py::arg("q_dot"), py::arg("k_dot"), py::arg("v_dot"),
        "Throws what forward_jvp and jvp would throw of what the forward does not have, without computing.");
  m.def("check_backward_jvp", &mixed_attention::check_backward_jvp, py::arg("dout_dot"), py::arg("dlse_dot"),
        py::arg("dout"), py::arg("dlse"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
        py::arg("q_dot"), py::arg("k_dot"), py::arg("v_dot"), py::arg("out_dot"), py::arg("lse_dot"),
        py::arg("wants_dq_dot"), "Throws what backward_jvp would throw likewise.");
  m.def("check_dense", &mixed_attention::check_dense, py::arg("name"), py::arg("tensor"),
        "Throws where a tensor is sparse, quantized or nested.");
  m.def("check_rope", &mixed_attention::check_rope, py::arg("x"), py::arg("freqs"), py::arg("out"),
        "Throws what rope_out would throw, without computing.");
}

// Nodes of the graph in plain eager mode.
void define_nodes(py::module_& m) {
  py::class_<mixed_attention::ProjectedPart>(m, "ProjectedPart", "Rows of a weight, and the tokens that they see.")
      .def(py::init<int64_t, int64_t, std::optional<mixed_attention::Ranges>>(), py::arg("row_begin"),
           py::arg("row_end"), py::arg("tokens"));
  m.def("project", &mixed_attention::project, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("parts"),
        py::arg("dtype"), py::call_guard<py::gil_scoped_release>(),
        "Products of tokens with parts of a weight, as one step of the graph.");
  using FlatPlan = mixed_attention::FlatPlan;
  py::class_<FlatPlan, std::shared_ptr<FlatPlan>>(m, "FlatPlan", "A plan's integers, for as many calls as it serves.")
      .def(py::init<std::vector<int64_t>>(), py::arg("numbers"));
  py::implicitly_convertible<py::list, FlatPlan>();
  py::class_<mixed_attention::AttentionCall>(m, "AttentionCall", "What an attention computes.")
      .def_property_readonly("segments", &mixed_attention::AttentionCall::segments)
      .def_readonly("softmax_scale", &mixed_attention::AttentionCall::softmax_scale)
      .def_readonly("dropout_p", &mixed_attention::AttentionCall::dropout_p);
  m.def(
      "attend",
      [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::shared_ptr<FlatPlan>& plan,
         double softmax_scale, const std::optional<at::Tensor>& key_padding_mask, double dropout_p,
         const std::optional<at::Tensor>& dropout_seed) {
        return mixed_attention::attend(q, k, v, key_padding_mask, dropout_seed, {plan, softmax_scale, dropout_p});
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("plan").none(false), py::arg("softmax_scale"),
      py::arg("key_padding_mask"), py::arg("dropout_p"), py::arg("dropout_seed"),
      py::call_guard<py::gil_scoped_release>(), "The forward operator, as one step of the graph.");
  m.def(
      "set_attention_composite",
      [](const py::function& composite) {
        mixed_attention::set_attention_composite(from_python<mixed_attention::OptionalTensors>(composite));
      },
      py::arg("composite"), "Registers the backward of attend that has derivatives itself.");
  py::class_<mixed_attention::PackedCall, mixed_attention::AttentionCall>(
      m, "PackedCall", "What an attention over packed buffers computes.")
      .def(
          py::init([](std::vector<std::vector<int64_t>> shapes, std::vector<int64_t> rotated,
                      std::vector<std::optional<mixed_attention::Ranges>> tokens, const std::shared_ptr<FlatPlan>& plan,
                      double softmax_scale, double dropout_p, std::optional<std::vector<int64_t>> normalised) {
            if (!normalised) normalised.emplace(shapes.size(), 0);
            return mixed_attention::PackedCall{{plan, softmax_scale, dropout_p},
                                               std::move(shapes),
                                               std::move(*normalised),
                                               std::move(rotated),
                                               std::move(tokens)};
          }),
          py::arg("shapes"), py::arg("rotated"), py::arg("tokens"), py::arg("plan").none(false),
          py::arg("softmax_scale"), py::arg("dropout_p"), py::arg("normalised") = py::none())
      .def_readonly("shapes", &mixed_attention::PackedCall::shapes)
      .def_readonly("normalised", &mixed_attention::PackedCall::normalised)
      .def_readonly("rotated", &mixed_attention::PackedCall::rotated)
      .def_readonly("tokens", &mixed_attention::PackedCall::tokens);
  m.def("attend_in_place", &mixed_attention::attend_in_place, py::arg("buffers"), py::arg("freqs"),
        py::arg("key_padding_mask"), py::arg("dropout_seed"), py::arg("call"), py::call_guard<py::gil_scoped_release>(),
        "Rotates packed buffers where they lie and attends.");
  py::class_<mixed_attention::LayerCall>(m, "LayerCall", "What a layer computes, but for its tensors.")
      .def(py::init<std::vector<mixed_attention::ProjectedPart>, mixed_attention::PackedCall>(), py::arg("parts"),
           py::arg("attention"));
  m.def("run_layer", &run_layer, py::arg("x"), py::arg("maps"), py::arg("freqs"), py::arg("key_padding_mask"),
        py::arg("call"),
        "A whole layer: the tokens and the buffers of q, k and v, or None, and nothing done, where this is no plain "
        "eager mode or something does not fit.");
  m.def(
      "set_backward_composite",
      [](const py::function& composite) {
        mixed_attention::set_backward_composite(from_python<mixed_attention::OptionalTensors>(composite));
      },
      py::arg("composite"), "Registers the backward of attend_in_place that has derivatives itself.");
}

// The same over ranks, and the collectives of which they consist.
void define_ranks(py::module_& m) {
  py::class_<mixed_attention::Shards, std::shared_ptr<mixed_attention::Shards>>(
      m, "Shards", "Where the rows of some groups lie that are spread over ranks.")
      .def(py::init<std::string, int64_t, bool, std::vector<std::vector<int64_t>>>(), py::arg("group"), py::arg("rank"),
           py::arg("share_a_host"), py::arg("sizes"))
      .def_readonly("group", &mixed_attention::Shards::group)
      .def_readonly("sizes", &mixed_attention::Shards::sizes);
  py::class_<mixed_attention::InFlight>(m, "InFlight", "A collective that runs.");
  m.def(
      "start_gather",
      [](const at::Tensor& rows, const std::shared_ptr<mixed_attention::Shards>& shards) {
        return mixed_attention::start_gather({{rows}}, *shards);
      },
      py::arg("rows"), py::arg("shards"), py::call_guard<py::gil_scoped_release>(),
      "Starts to bring the rows of all ranks together.");
  m.def(
      "finish_gather",
      [](const mixed_attention::InFlight& gather, const std::shared_ptr<mixed_attention::Shards>& shards) {
        return mixed_attention::finish_gather(gather, *shards)[0];
      },
      py::arg("gather"), py::arg("shards"), py::call_guard<py::gil_scoped_release>(), "Waits for it: the whole.");
  m.def(
      "start_sums",
      [](const at::Tensor& rows, const std::shared_ptr<mixed_attention::Shards>& shards) {
        return mixed_attention::start_sums({rows}, *shards, rows.scalar_type());
      },
      py::arg("rows"), py::arg("shards"), py::call_guard<py::gil_scoped_release>(),
      "Starts to add up rows of the whole over all ranks.");
  m.def(
      "finish_sums",
      [](const mixed_attention::InFlight& sums, const std::shared_ptr<mixed_attention::Shards>& shards) {
        return mixed_attention::finish_sums(sums, *shards)[0];
      },
      py::arg("sums"), py::arg("shards"), py::call_guard<py::gil_scoped_release>(),
      "Waits for it: the sums of the rows of this rank.");
  m.def(
      "gather_tokens",
      [](const std::vector<at::Tensor>& parts, const std::optional<mixed_attention::Ranges>& tokens,
         const std::shared_ptr<mixed_attention::Shards>& shards) {
        return mixed_attention::gather_tokens(parts, tokens, shards);
      },
      py::arg("parts"), py::arg("tokens"), py::arg("shards"), py::call_guard<py::gil_scoped_release>(),
      "Brings tokens of all ranks together, as one step of the graph.");
  using mixed_attention::SpreadCall;
  py::class_<SpreadCall>(m, "SpreadCall", "What an attention over ranks computes.")
      .def(py::init<mixed_attention::PackedCall, mixed_attention::PackedCall,
                    std::shared_ptr<mixed_attention::Shards>>(),
           py::arg("here"), py::arg("attention"), py::arg("shards"))
      .def_readonly("here", &SpreadCall::here)
      .def_readonly("attention", &SpreadCall::attention)
      .def_readonly("shards", &SpreadCall::shards);
  py::class_<mixed_attention::SpreadLayerCall>(m, "SpreadLayerCall", "What a layer over ranks computes.")
      .def(py::init<std::vector<mixed_attention::ProjectedPart>, SpreadCall>(), py::arg("parts"), py::arg("attention"));
  m.def(
      "fits_layer",
      [](const py::handle& x, const py::list& maps, const py::handle& freqs, int64_t num_heads, int64_t head_dim) {
        const auto given = layer_tensors(x, maps, freqs, py::none());
        return given &&
               mixed_attention::fits_layer(*given->x, given->in, given->out, given->freqs, num_heads, head_dim);
      },
      py::arg("x"), py::arg("maps"), py::arg("freqs"), py::arg("num_heads"), py::arg("head_dim"),
      "Whether run_layer would run.");
  m.def("run_layer_over_ranks", &run_layer_over_ranks, py::arg("x"), py::arg("maps"), py::arg("freqs"), py::arg("call"),
        "A whole layer over ranks: the tokens, and the buffers of this rank, or None as run_layer.");
  m.def(
      "set_sums_composite",
      [](const py::function& composite) {
        mixed_attention::set_sums_composite(from_python<std::vector<at::Tensor>>(composite));
      },
      py::arg("composite"), "Registers the sums over ranks that have derivatives themselves.");
  m.def(
      "set_spread_composite",
      [](const py::function& composite) {
        mixed_attention::set_spread_composite(from_python<std::vector<at::Tensor>>(composite));
      },
      py::arg("composite"), "Registers the backward of an attention over ranks that has derivatives itself.");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of mixed_attention; its operators live in torch.ops.mixed_attention.";
  define_questions(m);
  define_checks(m);
  define_nodes(m);
  define_ranks(m);
  mixed_attention::define_tested_internals(m);
}
