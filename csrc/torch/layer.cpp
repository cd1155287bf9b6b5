#include "torch/layer.h"

#include <ATen/DimVector.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "torch/checks.h"
#include "torch/ops.h"

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

// The inverse: rows of the tokens that were taken, with zeros between them.
Tensor put_back(const Tensor& rows, const Ranges& ranges, int64_t num_tokens) {
  std::vector<Tensor> pieces;
  const auto skip = [&](int64_t from, int64_t to) {
    if (from < to) pieces.push_back(at::zeros({rows.size(0), to - from, rows.size(2)}, rows.options()));
  };
  int64_t place = 0, taken = 0;
  for (const auto& [start, end] : ranges) {
    skip(place, start);
    pieces.push_back(rows.slice(1, taken, taken + end - start));
    taken += end - start;
    place = end;
  }
  skip(place, num_tokens);
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

// Whether Python sees every operation, as selective checkpointing does to keep results: then what was made must stay as
// it is, and be made by operations that return it, as one that writes elsewhere might be left out of a recomputation.
bool is_watched() { return c10::impl::dispatch_mode_enabled(); }

// Tensors in another dtype, those that have it as they are. The others take one launch together where they can.
variable_list cast_all(const variable_list& tensors, at::ScalarType dtype) {
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
  if (!from.empty()) at::_foreach_copy_(to, from);
  return result;
}

// The tokens and the weight, cast, and what comes of them.
struct Projected {
  Tensor tokens, weight;
  variable_list products;
};

Projected run_project(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::vector<ProjectedPart>& parts, at::ScalarType dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView guard;
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
    torch::autograd::impl::set_gradient_edge(stand_in, weight_edge);
    return stand_in.to(cast_weight.scalar_type());
  }
};

// NOTE: saved is what nn.Linear saves: the tokens if the weight needs a gradient, the weight if the tokens do. Where
// tokens had to be cast and both need one, they are an output, so that what is saved is connected to the graph, and a
// second derivative finds the way from it to the input.
struct Project : torch::autograd::Function<Project> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, const std::vector<ProjectedPart>& parts,
                               at::ScalarType dtype) {
    auto [tokens, cast_weight, outputs] = run_project(x, weight, bias, parts, dtype);
    const bool both = x.requires_grad() && weight.requires_grad();
    const bool has_cast_tokens = both && x.scalar_type() != dtype,
               has_cast_weight = both && weight.scalar_type() != dtype;
    if (has_cast_tokens) outputs.push_back(tokens);
    ctx->save_for_backward({weight.requires_grad() ? tokens : Tensor(), x.requires_grad() ? cast_weight : Tensor()});
    ctx->saved_data["state"] = Kept<ProjectState>::make(
        {parts,
         x.size(1),
         weight.size(0),
         x.scalar_type(),
         weight.scalar_type(),
         bias ? std::optional(bias->scalar_type()) : std::nullopt,
         has_cast_tokens,
         has_cast_weight ? torch::autograd::impl::gradient_edge(weight) : torch::autograd::Edge(),
         {}});
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    ProjectState& state = Kept<ProjectState>::of(ctx->saved_data["state"]);
    state.memory.check();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
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
      tokens.storage().unsafeGetStorageImpl()->release_resources();
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

// The same into new memory, by operations that return what they make.
Tensor rotate_copy(const Tensor& buffer, const std::vector<int64_t>& shape, int64_t rotated, const Tensor& freqs,
                   const std::optional<Ranges>& tokens) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mixed_attention::rope", "").typed<decltype(rope)>();
  const int64_t num_heads = shape[3], num_rotated = rotated * num_heads;
  const Tensor heads = buffer.view({shape[0], shape[1], shape[2] * num_heads, shape[4]});
  const Tensor turned = op.call(heads.slice(2, 0, num_rotated), take(freqs, tokens), false);
  return at::cat({turned, heads.slice(2, num_rotated)}, 2).view(buffer.sizes());
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

// Whether somebody may see a product beside the one who hands it over: another tensor over its memory, or whoever
// watches.
bool is_seen(const Tensor& buffer) { return is_watched() || buffer.storage().use_count() != 1; }

struct Attended {
  Tensor out, lse;
  variable_list buffers;  // as they were read
  variable_list rotated;  // those of them that have frequencies
  variable_list written;  // those of them that were rotated where they lie
};

// Rotates the buffers that have frequencies, where they lie if nobody sees it, and attends.
Attended run_attend(at::TensorList given, const OptionalTensors& freqs, const std::optional<Tensor>& key_padding_mask,
                    const std::optional<Tensor>& dropout_seed, const PackedCall& call) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixed_attention::forward", "")
                             .typed<decltype(mixed_attention::forward)>();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView guard;
  Attended result{{}, {}, given.vec(), {}, {}};
  for (size_t part = 0; part < given.size(); ++part) {
    if (!freqs[part]) continue;
    Tensor& buffer = result.buffers[part];
    if (is_seen(buffer)) {
      buffer = rotate_copy(buffer, call.shapes[part], call.rotated[part], *freqs[part], call.tokens[part]);
    } else {
      rotate_in_place(buffer, call.shapes[part], call.rotated[part], *freqs[part], call.tokens[part], false);
      result.written.push_back(buffer);
    }
    result.rotated.push_back(buffer);
  }
  const std::vector<Tensor> qkv = slots(result.buffers, call.shapes);
  const auto [heads, lse] = op.call(qkv[0], qkv[1], qkv[2], call.segments, call.softmax_scale, key_padding_mask,
                                    call.dropout_p, dropout_seed);
  result.out = heads.flatten(2);
  result.lse = lse;
  return result;
}

struct AttendState {
  PackedCall call;
  SavedMemory memory;
};

// NOTE: what is saved are the rotated buffers, as outputs: so a second derivative finds the way through this node's own
// rotation, and a KV cache that is taken from them stays attached. Where nobody needs them after the backward, their
// gradients take their place.
struct AttendInPlace : torch::autograd::Function<AttendInPlace> {
  static variable_list forward(AutogradContext* ctx, at::TensorList buffers, const OptionalTensors& freqs,
                               const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& dropout_seed,
                               const PackedCall& call) {
    Attended attended = run_attend(buffers, freqs, key_padding_mask, dropout_seed, call);
    ctx->mark_dirty(attended.written);
    ctx->set_materialize_grads(false);
    variable_list saved{attended.out, attended.lse, key_padding_mask.value_or(Tensor()),
                        dropout_seed.value_or(Tensor())};
    saved.insert(saved.end(), attended.buffers.begin(), attended.buffers.end());
    for (const std::optional<Tensor>& each : freqs) saved.push_back(each.value_or(Tensor()));
    ctx->save_for_backward(saved);
    ctx->saved_data["state"] = Kept<AttendState>::make({call, {}});
    attended.rotated.insert(attended.rotated.begin(), attended.out);
    return attended.rotated;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    AttendState& state = Kept<AttendState>::of(ctx->saved_data["state"]);
    state.memory.check();
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const PackedCall& call = state.call;
    const size_t num_parts = (saved.size() - 4) / 2;
    const variable_list buffers(saved.begin() + 4, saved.begin() + 4 + num_parts);
    const variable_list freqs(saved.begin() + 4 + num_parts, saved.end());
    const std::optional<Tensor> mask = optional_tensor(saved[2]), seed = optional_tensor(saved[3]);
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
    // Outputs are those buffers that were rotated. The projection that took the output has run by now, and holds it no
    // more.
    bool may_overwrite_buffers = state.memory.may_be_given<AttendInPlace>(ctx);
    for (size_t part = 0; part < num_parts; ++part) {
      may_overwrite_buffers = may_overwrite_buffers && freqs[part].defined() && is_seen_by_nobody_else(buffers[part]);
    }
    const bool may_overwrite_out = may_overwrite_buffers && is_seen_by_nobody_else(saved[0]);
    const int64_t num_heads = call.shapes[0][3], head_dim = call.shapes[0][4];
    const Tensor dheads = dout.unflatten(2, {num_heads, head_dim}),
                 heads = saved[0].unflatten(2, {num_heads, head_dim});
    const std::vector<Tensor> qkv = slots(buffers, call.shapes);
    variable_list dbuffers;
    if (may_overwrite_buffers) state.memory.give();
    if (may_overwrite_buffers &&
        backward_in_place(dheads, std::nullopt, qkv[0], qkv[1], qkv[2], heads, saved[1], call.segments,
                          call.softmax_scale, mask, call.dropout_p, seed, may_overwrite_out)) {
      for (const Tensor& buffer : buffers) dbuffers.push_back(buffer.detach());
    } else {
      state.memory.take_back();
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

// Checks the ranges of some tokens: ascending, and inside. Returns how many they are.
int64_t check_ranges(const char* name, const Ranges& ranges, int64_t num_tokens) {
  int64_t place = 0, count = 0;
  for (const auto& [start, end] : ranges) {
    TORCH_CHECK_VALUE(place <= start && start <= end && end <= num_tokens, name, ": expected ascending ranges of ",
                      num_tokens, " tokens, got [", start, ", ", end, ") after ", place);
    place = end;
    count += end - start;
  }
  return count;
}

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

void check_packed(at::TensorList buffers, const OptionalTensors& freqs, const PackedCall& call) {
  const size_t num_parts = buffers.size();
  TORCH_CHECK_VALUE(freqs.size() == num_parts && call.shapes.size() == num_parts && call.rotated.size() == num_parts &&
                        call.tokens.size() == num_parts,
                    "call: expected as many freqs, shapes, rotated and tokens as there are buffers, ", num_parts,
                    ", got ", freqs.size(), ", ", call.shapes.size(), ", ", call.rotated.size(), " and ",
                    call.tokens.size());
  int64_t num_slots = 0;
  for (size_t part = 0; part < num_parts; ++part) {
    const at::IntArrayRef shape = call.shapes[part];
    TORCH_CHECK_VALUE(shape.size() == 5 && std::all_of(shape.begin(), shape.end(), [](int64_t n) { return n >= 0; }),
                      "shapes: expected (batch_size, seqlen, slots, num_heads, head_dim), got ", shape);
    TORCH_CHECK_VALUE(buffers[part].defined() && buffers[part].numel() == c10::multiply_integers(shape),
                      "buffers: expected as many numbers as shape ", shape, " has, got ",
                      buffers[part].defined() ? buffers[part].numel() : 0);
    num_slots += shape[2];
    if (!freqs[part]) continue;
    TORCH_CHECK_VALUE(buffers[part].is_contiguous(), "buffers: expected contiguous ones to rotate, got strides ",
                      buffers[part].strides());
    TORCH_CHECK_VALUE(0 <= call.rotated[part] && call.rotated[part] <= shape[2], "rotated: expected at most ", shape[2],
                      " slots, got ", call.rotated[part]);
    check_rank("freqs", *freqs[part], 4, "(batch_size or 1, seqlen, head_dim / 2, 2)");
    if (!call.tokens[part]) continue;
    const int64_t count = check_ranges("tokens", *call.tokens[part], freqs[part]->size(1));
    TORCH_CHECK_VALUE(count == shape[1], "tokens: expected ranges of ", shape[1], " tokens, got ", count);
  }
  TORCH_CHECK_VALUE(num_slots == 3, "shapes: expected three slots, q, k and v, got ", num_slots);
}

}  // namespace

std::vector<Tensor> project(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const std::vector<ProjectedPart>& parts, at::ScalarType dtype) {
  check_project(x, weight, bias, parts);
  if (!c10::GradMode::is_enabled()) return run_project(x, weight, bias, parts, dtype).products;
  variable_list results = Project::apply(x, weight, bias, parts, dtype);
  results.resize(parts.size());  // without what was cast
  return results;
}

std::vector<Tensor> attend_in_place(const std::vector<Tensor>& buffers, const OptionalTensors& freqs,
                                    const std::optional<Tensor>& key_padding_mask,
                                    const std::optional<Tensor>& dropout_seed, const PackedCall& call) {
  check_packed(buffers, freqs, call);
  if (!c10::GradMode::is_enabled()) {
    Attended attended = run_attend(buffers, freqs, key_padding_mask, dropout_seed, call);
    for (const Tensor& each : attended.written) {
      if (!each.is_inference()) torch::autograd::impl::bump_version(each);
    }
    attended.rotated.insert(attended.rotated.begin(), attended.out);
    return attended.rotated;
  }
  return AttendInPlace::apply(at::TensorList(buffers), freqs, key_padding_mask, dropout_seed, call);
}

void set_backward_composite(BackwardComposite composite) { backward_composite() = std::move(composite); }

}  // namespace mixed_attention
