#include "layer.h"

#include <ATen/DimVector.h>
#include <ATen/Functions.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include "ops.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor take(const Tensor& x, const std::optional<Ranges>& ranges) {
  if (!ranges) return x;
  std::vector<Tensor> pieces;
  for (const auto& [start, end] : *ranges) pieces.push_back(x.slice(1, start, end));
  return pieces.empty() ? x.slice(1, 0, 0) : pieces.size() == 1 ? pieces[0] : at::cat(pieces, 1);
}

// The inverse: rows of the tokens that were taken, with zeros between them, as many tokens as `like` has.
Tensor put_back(const Tensor& rows, const Ranges& ranges, const Tensor& like) {
  std::vector<Tensor> pieces;
  const auto skip = [&](int64_t from, int64_t to) {
    if (from < to) pieces.push_back(at::zeros({like.size(0), to - from, like.size(2)}, rows.options()));
  };
  int64_t place = 0, taken = 0;
  for (const auto& [start, end] : ranges) {
    skip(place, start);
    pieces.push_back(rows.slice(1, taken, taken + end - start));
    taken += end - start;
    place = end;
  }
  skip(place, like.size(1));
  return at::cat(pieces, 1);
}

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

// The sum of all rows in another dtype. GPUs multiply by ones, which is exact and takes half of a reduction's time and
// none of its memory, tens of megabytes; CPUs would first convert all rows, which takes as long as a product.
Tensor sum_rows(const Tensor& rows, at::ScalarType dtype, bool differentiable) {
  if (!rows.is_cuda()) return rows.sum(0).to(dtype);
  if (rows.element_size() > 2 || differentiable) return rows.sum(0, false, dtype);
  return at::mm(at::ones({1, rows.size(0)}, rows.options()), rows, at::kFloat).squeeze(0).to(dtype);
}

// Tensors in another dtype, those that have it as they are. The others take one launch together where they can.
variable_list cast_all(const variable_list& tensors, at::ScalarType dtype) {
  variable_list result = tensors, from, to;
  for (Tensor& each : result) {
    if (each.scalar_type() == dtype) continue;
    from.push_back(each);
    each = at::empty_like(each, each.options().dtype(dtype));
    to.push_back(each);
  }
  if (!from.empty()) at::_foreach_copy_(to, from);
  return result;
}

// To be asked while a node saves its outputs, for may_overwrite.
void note_hooks(AutogradContext* ctx) {
  ctx->saved_data["is_hooked"] = at::SavedTensorDefaultHooks::get_hooks().has_value();
}

// Of an output that a node has saved: whether nobody needs it any more. This is the last time that a backward goes
// through the graph, no hook has seen what was saved and may hold it, and beside what is saved and what came of it
// nobody sees the memory; a recorded cache, say. NOTE: hooks bring along tensors of their own, and another number.
// Inputs have another one, too, which says nothing of who else holds them.
bool may_overwrite(AutogradContext* ctx, const Tensor& unpacked) {
  return !torch::autograd::get_current_graph_task_keep_graph() && !ctx->saved_data["is_hooked"].toBool() &&
         unpacked.storage().use_count() == 2;
}

// The tokens, cast, and what comes of them.
struct Projected {
  Tensor tokens, weight;
  variable_list products;
};

Projected run_project(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::vector<ProjectedPart>& parts, at::ScalarType dtype) {
  variable_list given{x, weight};
  if (bias) given.push_back(*bias);
  const variable_list cast = cast_all(given, dtype);
  Projected result{cast[0], cast[1], {}};
  for (const ProjectedPart& part : parts) {
    const Tensor seen = take(result.tokens, part.tokens);
    const Tensor columns = result.weight.slice(0, part.row_begin, part.row_end).t();
    result.products.push_back(
        three_dims(bias ? at::addmm(cast[2].slice(0, part.row_begin, part.row_end), two_dims(seen), columns)
                        : at::mm(two_dims(seen), columns),
                   seen));
  }
  return result;
}

// One gradient out of those of neighbouring rows, with zeros where there is none.
Tensor join_rows(const variable_list& grads, const std::vector<ProjectedPart>& parts, const Tensor& like) {
  if (grads.size() == 1 && grads[0].defined() && grads[0].size(0) == like.size(0)) return grads[0];
  variable_list pieces;
  const auto skip = [&](int64_t from, int64_t to) {
    if (from == to) return;
    at::DimVector shape(like.sizes());
    shape[0] = to - from;
    pieces.push_back(at::zeros(shape, like.options()));
  };
  int64_t place = 0;
  for (size_t part = 0; part < parts.size(); ++part) {
    if (!grads[part].defined()) continue;
    skip(place, parts[part].row_begin);
    pieces.push_back(grads[part]);
    place = parts[part].row_end;
  }
  skip(place, like.size(0));
  return at::cat(pieces);
}

// NOTE: the tokens as they were multiplied are an output where they had to be cast, so that what is saved for the
// backward is connected to the graph, and a second derivative finds the way from it to the input.
struct Project : torch::autograd::Function<Project> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, const std::vector<ProjectedPart>& parts,
                               at::ScalarType dtype) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    Projected projected = run_project(x, weight, bias, parts, dtype);
    const bool is_cast = x.scalar_type() != dtype;
    ctx->save_for_backward({projected.tokens, projected.weight, weight, bias.value_or(Tensor())});
    ctx->saved_data["parts"] = Kept<std::vector<ProjectedPart>>::make(parts);
    ctx->saved_data["x_dtype"] = x.scalar_type();
    note_hooks(ctx);
    ctx->set_materialize_grads(false);
    if (is_cast && !x.requires_grad()) ctx->mark_non_differentiable({projected.tokens});
    if (is_cast) projected.products.push_back(projected.tokens);
    return projected.products;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const bool differentiable = needs_composite(grads);
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!differentiable) guard.emplace();
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &tokens = saved[0], &original = saved[2], &bias = saved[3];
    const Tensor weight = differentiable ? original.to(tokens.scalar_type()) : saved[1];
    const auto& parts = Kept<std::vector<ProjectedPart>>::of(ctx->saved_data["parts"]);
    const auto x_dtype = ctx->saved_data["x_dtype"].toScalarType();
    const bool is_cast = grads.size() > parts.size();
    Tensor dx = is_cast && grads.back().defined() ? grads.back().to(x_dtype) : Tensor();
    variable_list dweights(parts.size()), dbiases(parts.size());
    bool has_grad = false;
    for (size_t i = 0; i < parts.size(); ++i) {
      if (!grads[i].defined()) continue;
      has_grad = true;
      const Tensor rows = two_dims(grads[i]);
      if (ctx->needs_input_grad(1)) {
        const Tensor seen = two_dims(take(tokens, parts[i].tokens));
        dweights[i] = multiply(rows.t(), seen, original.scalar_type(), differentiable);
      }
      if (bias.defined() && ctx->needs_input_grad(2)) {
        dbiases[i] = sum_rows(rows, bias.scalar_type(), differentiable);
      }
    }
    // Cast tokens give their memory back: their gradient takes most of all that is needed from here on.
    if (is_cast && !differentiable && may_overwrite(ctx, tokens)) {
      tokens.storage().unsafeGetStorageImpl()->release_resources();
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      if (!grads[i].defined() || !ctx->needs_input_grad(0)) continue;
      const Tensor columns = weight.slice(0, parts[i].row_begin, parts[i].row_end);
      if (dx.defined() && dx.size(0) == 1 && !differentiable) {
        add_products(dx[0], grads[i][0], columns, parts[i].tokens);
      } else {
        const Tensor through = multiply(two_dims(grads[i]), columns, x_dtype, differentiable);
        dx = add_to_tokens(dx, three_dims(through, grads[i]), parts[i].tokens, tokens, differentiable);
      }
    }
    variable_list result(5);
    result[0] = dx;
    if (has_grad && ctx->needs_input_grad(1)) result[1] = join_rows(dweights, parts, original);
    if (has_grad && bias.defined() && ctx->needs_input_grad(2)) result[2] = join_rows(dbiases, parts, bias);
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

  // The gradient of the tokens `like`, given that of some.
  static Tensor add_to_tokens(const Tensor& sum, const Tensor& rows, const std::optional<Ranges>& ranges,
                              const Tensor& like, bool differentiable) {
    if (!sum.defined() || differentiable) {
      const Tensor whole = ranges ? put_back(rows, *ranges, like) : rows;
      return sum.defined() ? sum + whole : whole;
    }
    int64_t taken = 0;
    for (const auto& [start, end] : ranges.value_or(Ranges{{0, like.size(1)}})) {
      sum.slice(1, start, end).add_(rows.slice(1, taken, taken + end - start));
      taken += end - start;
    }
    return sum;
  }
};

std::vector<Tensor> slots(at::TensorList buffers, const std::vector<std::vector<int64_t>>& shapes) {
  std::vector<Tensor> found;
  for (size_t part = 0; part < buffers.size(); ++part) {
    const Tensor packed = buffers[part].view(shapes[part]);
    for (int64_t slot = 0; slot < packed.size(2); ++slot) found.push_back(packed.select(2, slot));
  }
  return found;
}

// Of frequencies for more tokens than there are, those that the ranges take.
void rotate_in_place(const Tensor& buffer, const std::vector<int64_t>& shape, int64_t rotated, const Tensor& freqs,
                     const std::optional<Ranges>& tokens, bool conjugate) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mixed_attention::rope_out", "").typed<decltype(rope_out)>();
  const int64_t num_heads = shape[3], head_dim = shape[4], row = shape[2] * num_heads * head_dim;
  const Tensor heads =
      buffer.as_strided({shape[0], shape[1], rotated * num_heads, head_dim}, {shape[1] * row, row, head_dim, 1});
  if (!tokens) {
    op.call(heads, freqs, conjugate, heads);
    return;
  }
  int64_t place = 0;
  for (const auto& [start, end] : *tokens) {
    const Tensor run = heads.slice(1, place, place + end - start);
    op.call(run, freqs.slice(1, start, end), conjugate, run);
    place += end - start;
  }
}

OptionalTensors optional_tensors(variable_list::const_iterator begin, size_t count) {
  OptionalTensors result;
  for (auto each = begin; each != begin + count; ++each) {
    result.push_back(each->defined() ? std::optional(*each) : std::nullopt);
  }
  return result;
}

BackwardComposite& backward_composite() {
  static BackwardComposite composite;
  return composite;
}

// Rotates the buffers where they lie. Returns the output and the log-sum-exp.
std::pair<Tensor, Tensor> run_attend_in_place(at::TensorList buffers, const OptionalTensors& freqs,
                                              const std::optional<Tensor>& key_padding_mask,
                                              const std::optional<Tensor>& dropout_seed, const PackedCall& call) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixed_attention::forward", "")
                             .typed<decltype(mixed_attention::forward)>();
  for (size_t part = 0; part < buffers.size(); ++part) {
    if (!freqs[part]) continue;
    rotate_in_place(buffers[part], call.shapes[part], call.rotated[part], *freqs[part], call.tokens[part], false);
  }
  const std::vector<Tensor> qkv = slots(buffers, call.shapes);
  const auto [heads, lse] = op.call(qkv[0], qkv[1], qkv[2], call.segments, call.softmax_scale, key_padding_mask,
                                    call.dropout_p, dropout_seed);
  return {heads.flatten(2), lse};
}

// Those that have frequencies.
variable_list rotated_buffers(at::TensorList buffers, const OptionalTensors& freqs) {
  variable_list rotated;
  for (size_t part = 0; part < buffers.size(); ++part) {
    if (freqs[part]) rotated.push_back(buffers[part]);
  }
  return rotated;
}

// NOTE: what is saved are the rotated buffers, as outputs: so a second derivative finds the way through this node's own
// rotation, and a KV cache that is taken from them stays attached. Where nobody needs them after the backward, their
// gradients take their place.
struct AttendInPlace : torch::autograd::Function<AttendInPlace> {
  static variable_list forward(AutogradContext* ctx, at::TensorList buffers, const OptionalTensors& freqs,
                               const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& dropout_seed,
                               const PackedCall& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, lse] = run_attend_in_place(buffers, freqs, key_padding_mask, dropout_seed, call);
    const variable_list rotated = rotated_buffers(buffers, freqs);
    ctx->mark_dirty(rotated);
    ctx->set_materialize_grads(false);
    variable_list saved{out, lse, key_padding_mask.value_or(Tensor()), dropout_seed.value_or(Tensor())};
    saved.insert(saved.end(), buffers.begin(), buffers.end());
    for (const std::optional<Tensor>& each : freqs) saved.push_back(each.value_or(Tensor()));
    ctx->save_for_backward(saved);
    ctx->saved_data["call"] = Kept<PackedCall>::make(call);
    note_hooks(ctx);
    variable_list results{out};
    results.insert(results.end(), rotated.begin(), rotated.end());
    return results;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = ctx->get_saved_variables();
    const size_t num_parts = (saved.size() - 4) / 2;
    const variable_list buffers(saved.begin() + 4, saved.begin() + 4 + num_parts);
    const variable_list freqs(saved.begin() + 4 + num_parts, saved.end());
    const std::optional<Tensor> mask = optional_tensor(saved[2]), seed = optional_tensor(saved[3]);
    const PackedCall& call = Kept<PackedCall>::of(ctx->saved_data["call"]);
    const Tensor dout = grads[0].defined() ? grads[0] : at::zeros_like(saved[0]);
    OptionalTensors drotated;  // of every buffer, also those that are no outputs because nothing rotates them
    size_t next = 1;
    for (const Tensor& each : freqs) drotated.push_back(each.defined() ? optional_tensor(grads[next++]) : std::nullopt);
    variable_list result(num_parts + 4);
    if (needs_composite(grads)) {
      const OptionalTensors found =
          backward_composite()(buffers, optional_tensors(freqs.begin(), num_parts), mask, seed, call, dout, drotated);
      for (size_t part = 0; part < num_parts; ++part) result[part] = found[part].value_or(Tensor());
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    // Those buffers are outputs that were rotated. The projection that took the output has run by now, and holds it no
    // more.
    bool may_overwrite_buffers = true;
    for (size_t part = 0; part < num_parts; ++part) {
      may_overwrite_buffers = may_overwrite_buffers && freqs[part].defined() && may_overwrite(ctx, buffers[part]);
    }
    const bool may_overwrite_out = may_overwrite(ctx, saved[0]);
    const int64_t num_heads = call.shapes[0][3], head_dim = call.shapes[0][4];
    const Tensor dheads = dout.unflatten(2, {num_heads, head_dim}),
                 heads = saved[0].unflatten(2, {num_heads, head_dim});
    const std::vector<Tensor> qkv = slots(buffers, call.shapes);
    variable_list dbuffers;
    if (may_overwrite_buffers &&
        backward_in_place(dheads, std::nullopt, qkv[0], qkv[1], qkv[2], heads, saved[1], call.segments,
                          call.softmax_scale, mask, call.dropout_p, seed, may_overwrite_out)) {
      for (const Tensor& buffer : buffers) dbuffers.push_back(buffer.detach());
    } else {
      for (const Tensor& buffer : buffers) dbuffers.push_back(at::empty_like(buffer));
      static const auto op = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("mixed_attention::backward_out", "")
                                 .typed<decltype(backward_out)>();
      const std::vector<Tensor> dqkv = slots(dbuffers, call.shapes);
      op.call(dheads, std::nullopt, qkv[0], qkv[1], qkv[2], heads, saved[1], call.segments, call.softmax_scale, mask,
              call.dropout_p, seed, dqkv[0], dqkv[1], dqkv[2]);
    }
    for (size_t part = 0; part < num_parts; ++part) {
      if (drotated[part]) dbuffers[part].add_(*drotated[part]);
      if (freqs[part].defined()) {
        rotate_in_place(dbuffers[part], call.shapes[part], call.rotated[part], freqs[part], call.tokens[part], true);
      }
      result[part] = dbuffers[part];
    }
    return result;
  }
};

}  // namespace

std::vector<Tensor> project(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const std::vector<ProjectedPart>& parts, at::ScalarType dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (!c10::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return run_project(x, weight, bias, parts, dtype).products;
  }
  variable_list results = Project::apply(x, weight, bias, parts, dtype);
  results.resize(parts.size());  // without the cast tokens
  return results;
}

std::vector<Tensor> attend_in_place(const std::vector<Tensor>& buffers, const OptionalTensors& freqs,
                                    const std::optional<Tensor>& key_padding_mask,
                                    const std::optional<Tensor>& dropout_seed, const PackedCall& call) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (!c10::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    variable_list results = rotated_buffers(buffers, freqs);
    results.insert(results.begin(), run_attend_in_place(buffers, freqs, key_padding_mask, dropout_seed, call).first);
    return results;
  }
  return AttendInPlace::apply(at::TensorList(buffers), freqs, key_padding_mask, dropout_seed, call);
}

void set_backward_composite(BackwardComposite composite) { backward_composite() = std::move(composite); }

}  // namespace mixed_attention
