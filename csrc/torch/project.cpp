#include "torch/project.h"

#include <ATen/DimVector.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "torch/autograd.h"
#include "torch/checks.h"
#include "torch/ops.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor two_dims(const Tensor& x) { return x.reshape({x.size(0) * x.size(1), x.size(2)}); }

Tensor three_dims(const Tensor& rows, const Tensor& like) {
  return rows.view({like.size(0), like.size(1), rows.size(1)});
}

// Whether products of such factors can be made in another dtype than theirs, rounded once; without a derivative.
bool can_widen(const Tensor& factor, at::ScalarType dtype) { return factor.is_cuda() && dtype == at::kFloat; }

// A matrix product in another dtype than that of its factors, rounded once where the device can.
Tensor multiply(const Tensor& a, const Tensor& b, at::ScalarType dtype, bool differentiable) {
  if (a.scalar_type() == dtype) return at::mm(a, b);
  if (can_widen(a, dtype) && !differentiable) return at::mm(a, b, dtype);
  return at::mm(a, b).to(dtype);
}

// Adds a matrix product in the dtype of the sum, without memory for the product where the device can.
void add_product(Tensor sum, const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == sum.scalar_type()) {
    sum.addmm_(a, b);
  } else if (can_widen(a, sum.scalar_type())) {
    at::addmm_out(sum, sum, a, b, sum.scalar_type());
  } else {
    sum.add_(at::mm(a, b));
  }
}

// The sum of all rows in another dtype. torch's own takes tens of megabytes on GPUs; on CPUs it would first convert all
// rows, which takes as long as a product.
Tensor sum_rows(const Tensor& rows, at::ScalarType dtype, bool differentiable) {
  if (!rows.is_cuda()) return rows.sum(0).to(dtype);
  const Tensor sums = differentiable ? Tensor() : sum_columns(rows);
  return sums.defined() ? sums.to(dtype) : rows.sum(0, false, dtype);
}

// cast: tokens, weight and, if there is one, bias, in the dtype of the products.
variable_list run_project(const variable_list& cast, const std::vector<ProjectedPart>& parts) {
  const WithoutAutocast no_autocast;
  const at::AutoDispatchBelowADInplaceOrView guard;
  variable_list products;
  for (const ProjectedPart& part : parts) {
    const Tensor seen = take(cast[0], part.tokens);
    const Tensor columns = cast[1].slice(0, part.row_begin, part.row_end).t();
    products.push_back(
        three_dims(cast.size() > 2 ? at::addmm(cast[2].slice(0, part.row_begin, part.row_end), two_dims(seen), columns)
                                   : at::mm(two_dims(seen), columns),
                   seen));
  }
  return products;
}

// One gradient out of those of neighbouring rows, with zeros where there is none; undefined if there is none at all.
Tensor join_rows(const variable_list& grads, const std::vector<ProjectedPart>& parts, int64_t num_rows) {
  const auto some = std::find_if(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); });
  if (some == grads.end()) return {};
  if (some->size(0) == num_rows) return *some;
  variable_list pieces;
  const auto skip = [&](int64_t from, int64_t to) {
    if (from == to) return;
    at::DimVector shape(some->sizes());
    shape[0] = to - from;
    pieces.push_back(at::zeros(shape, some->options()));
  };
  int64_t place = 0;
  for (size_t part = 0; part < parts.size(); ++part) {
    if (!grads[part].defined()) continue;
    skip(place, parts[part].row_begin);
    pieces.push_back(grads[part]);
    place = parts[part].row_end;
  }
  skip(place, num_rows);
  return at::cat(pieces);
}

// What a projection knows of its inputs, most of which it does not save.
struct ProjectState {
  std::vector<ProjectedPart> parts;
  int64_t num_tokens, num_rows;
  at::ScalarType x_dtype, weight_dtype;
  std::optional<at::ScalarType> bias_dtype;  // if there is one
  bool has_cast_tokens;                      // as the last output
  torch::autograd::Edge weight_edge;         // where gradients of the weight go, if it was cast
  SavedMemory memory;

  // The saved cast of the weight as a part of the graph, so that a second derivative finds the way to the weight. What
  // lies between is as good as the weight: a rounded number is rounded to itself.
  Tensor connected(const Tensor& cast_weight) const {
    if (!cast_weight.defined() || !weight_edge.is_valid()) return cast_weight;
    const Tensor stand_in = cast_weight.detach().to(weight_dtype);
    set_gradient_edge(stand_in, weight_edge);
    return stand_in.to(cast_weight.scalar_type());
  }
};

// NOTE: saved is what nn.Linear saves: the tokens if the weight needs a gradient, the weight if the tokens do. Where
// tokens had to be cast and both need one, they are an output, so that what is saved is connected to the graph, and a
// second derivative finds the way from it to the input.
struct Project : torch::autograd::Function<Project> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, const std::vector<ProjectedPart>& parts,
                               const variable_list& cast) {
    variable_list outputs = run_project(cast, parts);
    const Tensor &tokens = cast[0], &cast_weight = cast[1];
    const at::ScalarType dtype = tokens.scalar_type();
    const bool both = x.requires_grad() && weight.requires_grad();
    const bool has_cast_tokens = both && x.scalar_type() != dtype,
               has_cast_weight = both && weight.scalar_type() != dtype;
    if (has_cast_tokens) outputs.push_back(tokens);
    ctx->save_for_backward({weight.requires_grad() ? tokens : Tensor(), x.requires_grad() ? cast_weight : Tensor()});
    ctx->saved_data["state"] =
        Kept<ProjectState>::make({parts,
                                  x.size(1),
                                  weight.size(0),
                                  x.scalar_type(),
                                  weight.scalar_type(),
                                  bias ? std::optional(bias->scalar_type()) : std::nullopt,
                                  has_cast_tokens,
                                  has_cast_weight ? gradient_edge(weight) : torch::autograd::Edge(),
                                  {}});
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    ProjectState& state = Kept<ProjectState>::of(ctx->saved_data["state"]);
    state.memory.check();
    const WithoutAutocast no_autocast;
    const bool differentiable = needs_composite(grads);
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!differentiable) guard.emplace();
    const Tensor& tokens = saved[0];
    const Tensor weight = differentiable ? state.connected(saved[1]) : saved[1];
    const auto& parts = state.parts;
    variable_list dweights(parts.size()), dbiases(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
      if (!grads[i].defined()) continue;
      const Tensor rows = two_dims(grads[i]);
      if (ctx->needs_input_grad(1)) {
        const Tensor seen = two_dims(take(tokens, parts[i].tokens));
        dweights[i] = multiply(rows.t(), seen, state.weight_dtype, differentiable);
      }
      if (state.bias_dtype && ctx->needs_input_grad(2)) dbiases[i] = sum_rows(rows, *state.bias_dtype, differentiable);
    }
    variable_list result(5);
    result[1] = join_rows(dweights, parts, state.num_rows);
    result[2] = join_rows(dbiases, parts, state.num_rows);
    if (!ctx->needs_input_grad(0)) return result;
    // Cast tokens give their memory back: their gradient takes most of all that is needed from here on.
    if (state.has_cast_tokens && !differentiable && is_seen_by_nobody_else(tokens) &&
        state.memory.may_be_given<Project>(ctx)) {
      state.memory.give();
      release_memory(tokens);
    }
    Tensor dx = state.has_cast_tokens && grads.back().defined() ? grads.back().to(state.x_dtype) : Tensor();
    for (size_t i = 0; i < parts.size(); ++i) {
      if (!grads[i].defined()) continue;
      const Tensor columns = weight.slice(0, parts[i].row_begin, parts[i].row_end);
      if (dx.defined() && dx.size(0) == 1 && !differentiable) {
        add_products(dx[0], grads[i][0], columns, parts[i].tokens);
      } else {
        const Tensor through = multiply(two_dims(grads[i]), columns, state.x_dtype, differentiable);
        dx = add_to_tokens(dx, three_dims(through, grads[i]), parts[i].tokens, state.num_tokens, differentiable);
      }
    }
    result[0] = dx;
    return result;
  }

 private:
  // Adds the products of rows with columns to those tokens that the rows are of.
  static void add_products(const Tensor& sum, const Tensor& rows, const Tensor& columns,
                           const std::optional<Ranges>& ranges) {
    int64_t taken = 0;
    for (const auto& [start, end] : ranges.value_or(Ranges{{0, sum.size(0)}})) {
      add_product(sum.slice(0, start, end), rows.slice(0, taken, taken + end - start), columns);
      taken += end - start;
    }
  }

  // The gradient of all tokens, given that of some.
  static Tensor add_to_tokens(const Tensor& sum, const Tensor& rows, const std::optional<Ranges>& ranges,
                              int64_t num_tokens, bool differentiable) {
    if (!sum.defined() || differentiable) {
      const Tensor whole = ranges ? put_back(rows, *ranges, num_tokens) : rows;
      return sum.defined() ? sum + whole : whole;
    }
    int64_t taken = 0;
    for (const auto& [start, end] : ranges.value_or(Ranges{{0, num_tokens}})) {
      sum.slice(1, start, end).add_(rows.slice(1, taken, taken + end - start));
      taken += end - start;
    }
    return sum;
  }
};

void check_project(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::vector<ProjectedPart>& parts) {
  check_rank("x", x, 3, "(batch_size, seqlen, channels)");
  check_rank("weight", weight, 2, "(rows, channels)");
  check_shape("weight", weight, {weight.size(0), x.size(2)}, "to match x");
  if (bias) check_shape("bias", *bias, {weight.size(0)}, "to match weight");
  int64_t place = 0;
  for (const ProjectedPart& part : parts) {
    TORCH_CHECK_VALUE(place <= part.row_begin && part.row_begin <= part.row_end && part.row_end <= weight.size(0),
                      "parts: expected ascending ranges of ", weight.size(0), " rows, got [", part.row_begin, ", ",
                      part.row_end, ") after ", place);
    place = part.row_end;
    if (part.tokens) check_ranges("parts", *part.tokens, x.size(1));
  }
}

}  // namespace

variable_list cast_all(const variable_list& tensors, at::ScalarType dtype) {
  const WithoutAutocast no_autocast;
  const at::AutoDispatchBelowADInplaceOrView guard;
  variable_list result = tensors, from, to;
  for (Tensor& each : result) {
    if (each.scalar_type() == dtype) continue;
    if (is_watched()) {
      each = each.to(dtype);
      continue;
    }
    from.push_back(each);
    each = at::empty_like(each, each.options().dtype(dtype));
    to.push_back(each);
  }
  if (!from.empty() && !cast_by_one_launch(from, to)) copy_all(to, from);
  return result;
}

std::vector<Tensor> project(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const std::vector<ProjectedPart>& parts, at::ScalarType dtype) {
  variable_list given{x, weight};
  if (bias) given.push_back(*bias);
  return project_cast(x, weight, bias, parts, cast_all(given, dtype));
}

std::vector<Tensor> project_cast(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                 const std::vector<ProjectedPart>& parts, const variable_list& cast) {
  check_project(x, weight, bias, parts);
  if (!c10::GradMode::is_enabled()) return run_project(cast, parts);
  variable_list results = Project::apply(x, weight, bias, parts, cast);
  results.resize(parts.size());  // without what was cast
  return results;
}

}  // namespace mixed_attention
