#include "layer.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

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

// A matrix product in another dtype than that of its factors, rounded once where the device can.
Tensor multiply(const Tensor& a, const Tensor& b, at::ScalarType dtype, bool differentiable) {
  if (a.scalar_type() == dtype) return at::mm(a, b);
  if (a.is_cuda() && dtype == at::kFloat && !differentiable) return at::mm(a, b, dtype);
  return at::mm(a, b).to(dtype);
}

// The sum of all rows in another dtype. GPUs multiply by ones, which is exact and takes half of a reduction's time;
// CPUs would first convert all rows, which takes as long as a product.
Tensor sum_rows(const Tensor& rows, at::ScalarType dtype, bool differentiable) {
  if (!rows.is_cuda()) return rows.sum(0).to(dtype);
  const bool is_widened = rows.element_size() == 2 && dtype == at::kFloat;
  if (!is_widened || differentiable) return rows.sum(0, false, dtype);
  return at::mm(at::ones({1, rows.size(0)}, rows.options()), rows, dtype).squeeze(0);
}

// NOTE: the tokens as they were multiplied are an output where they had to be cast, so that what is saved for the
// backward is connected to the graph, and a second derivative finds the way from it to the input.
struct Project : torch::autograd::Function<Project> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList weights, at::TensorList biases,
                               const std::vector<std::optional<Ranges>>& token_ranges, at::ScalarType dtype) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor tokens = x.to(dtype);
    const bool is_cast = x.scalar_type() != dtype;
    variable_list results, saved{tokens};
    if (is_cast) results.push_back(tokens);
    for (size_t part = 0; part < weights.size(); ++part) {
      const Tensor seen = take(tokens, token_ranges[part]), rows = two_dims(seen);
      const Tensor weight = weights[part].to(dtype);
      results.push_back(three_dims(
          biases.empty() ? at::mm(rows, weight.t()) : at::addmm(biases[part].to(dtype), rows, weight.t()), seen));
      saved.push_back(weight);
    }
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["x_dtype"] = static_cast<int64_t>(x.scalar_type());
    ctx->saved_data["bias_dtype"] = biases.empty() ? -1 : static_cast<int64_t>(biases[0].scalar_type());
    std::vector<int64_t> flat;
    for (const auto& ranges : token_ranges) {
      flat.push_back(ranges ? static_cast<int64_t>(ranges->size()) : -1);
      for (const auto& [start, end] : ranges.value_or(Ranges{})) flat.insert(flat.end(), {start, end});
    }
    ctx->saved_data["token_ranges"] = flat;
    ctx->set_materialize_grads(false);
    if (is_cast && !x.requires_grad()) ctx->mark_non_differentiable({tokens});
    return results;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const bool differentiable = needs_composite(grads);
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!differentiable) guard.emplace();
    const variable_list saved = ctx->get_saved_variables();
    const size_t num_parts = (saved.size() - 1) / 2;
    const Tensor& tokens = saved[0];
    const auto x_dtype = static_cast<at::ScalarType>(ctx->saved_data["x_dtype"].toInt());
    const int64_t bias_dtype = ctx->saved_data["bias_dtype"].toInt();
    const bool is_cast = grads.size() > num_parts;
    Tensor dx = is_cast && grads[0].defined() ? grads[0].to(x_dtype) : Tensor();
    const size_t num_biases = bias_dtype < 0 ? 0 : num_parts;
    variable_list result(1 + num_parts + num_biases + 2);
    std::vector<int64_t> flat = ctx->saved_data["token_ranges"].toIntVector();
    for (size_t part = 0, at = 0; part < num_parts; ++part) {
      std::optional<Ranges> ranges;
      if (const int64_t count = flat[at++]; count >= 0) {
        ranges.emplace();
        for (int64_t i = 0; i < count; ++i, at += 2) ranges->emplace_back(flat[at], flat[at + 1]);
      }
      const Tensor& grad = grads[is_cast + part];
      if (!grad.defined()) continue;
      const Tensor& original = saved[1 + num_parts + part];
      const Tensor weight = differentiable ? original.to(tokens.scalar_type()) : saved[1 + part];
      const Tensor rows = two_dims(grad);
      if (ctx->needs_input_grad(0)) {
        const Tensor through = three_dims(multiply(rows, weight, x_dtype, differentiable), grad);
        if (!dx.defined() || differentiable) {
          const Tensor whole = ranges ? put_back(through, *ranges, tokens) : through;
          dx = dx.defined() ? dx + whole : whole;
        } else if (ranges) {
          int64_t taken = 0;
          for (const auto& [start, end] : *ranges) {
            dx.slice(1, start, end).add_(through.slice(1, taken, taken + end - start));
            taken += end - start;
          }
        } else {
          dx.add_(through);
        }
      }
      if (ctx->needs_input_grad(1 + part)) {
        const Tensor seen = two_dims(take(tokens, ranges));
        result[1 + part] = multiply(rows.t(), seen, original.scalar_type(), differentiable);
      }
      if (num_biases > 0 && ctx->needs_input_grad(1 + num_parts + part)) {
        result[1 + num_parts + part] = sum_rows(rows, static_cast<at::ScalarType>(bias_dtype), differentiable);
      }
    }
    result[0] = dx;
    return result;
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

void rotate_in_place(const Tensor& buffer, const std::vector<int64_t>& shape, int64_t rotated, const Tensor& freqs,
                     bool conjugate) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mixed_attention::rope_out", "").typed<decltype(rope_out)>();
  const int64_t num_heads = shape[3], head_dim = shape[4], row = shape[2] * num_heads * head_dim;
  const Tensor heads =
      buffer.as_strided({shape[0], shape[1], rotated * num_heads, head_dim}, {shape[1] * row, row, head_dim, 1});
  op.call(heads, freqs, conjugate, heads);
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

// NOTE: what is saved are the rotated buffers, as outputs: so a second derivative finds the way through this node's own
// rotation, and a KV cache that is taken from them stays attached.
struct AttendInPlace : torch::autograd::Function<AttendInPlace> {
  static variable_list forward(AutogradContext* ctx, at::TensorList buffers, const OptionalTensors& freqs,
                               const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& dropout_seed,
                               const PackedCall& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    variable_list rotated;
    for (size_t part = 0; part < buffers.size(); ++part) {
      if (!freqs[part]) continue;
      rotate_in_place(buffers[part], call.shapes[part], call.rotated[part], *freqs[part], false);
      rotated.push_back(buffers[part]);
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mixed_attention::forward", "")
                               .typed<decltype(mixed_attention::forward)>();
    const std::vector<Tensor> qkv = slots(buffers, call.shapes);
    auto [heads, lse] = op.call(qkv[0], qkv[1], qkv[2], call.segments, call.softmax_scale, key_padding_mask,
                                call.dropout_p, dropout_seed);
    const Tensor out = heads.flatten(2);
    ctx->mark_dirty(rotated);
    ctx->set_materialize_grads(false);
    variable_list saved{out, lse, key_padding_mask.value_or(Tensor()), dropout_seed.value_or(Tensor())};
    saved.insert(saved.end(), buffers.begin(), buffers.end());
    for (const std::optional<Tensor>& each : freqs) saved.push_back(each.value_or(Tensor()));
    ctx->save_for_backward(saved);
    for (size_t part = 0; part < buffers.size(); ++part) {
      ctx->saved_data["shape" + std::to_string(part)] = call.shapes[part];
    }
    ctx->saved_data["rotated"] = call.rotated;
    ctx->saved_data["segments"] = call.segments;
    ctx->saved_data["softmax_scale"] = call.softmax_scale;
    ctx->saved_data["dropout_p"] = call.dropout_p;
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
    PackedCall call{{ctx->saved_data["segments"].toIntVector(), ctx->saved_data["softmax_scale"].toDouble(),
                     ctx->saved_data["dropout_p"].toDouble()},
                    {},
                    ctx->saved_data["rotated"].toIntVector()};
    for (size_t part = 0; part < num_parts; ++part) {
      call.shapes.push_back(ctx->saved_data["shape" + std::to_string(part)].toIntVector());
    }
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
    variable_list dbuffers;
    for (const Tensor& buffer : buffers) dbuffers.push_back(at::empty_like(buffer));
    const std::vector<Tensor> qkv = slots(buffers, call.shapes), dqkv = slots(dbuffers, call.shapes);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mixed_attention::backward_out", "")
                               .typed<decltype(backward_out)>();
    const int64_t num_heads = qkv[0].size(2), head_dim = qkv[0].size(3);
    op.call(dout.unflatten(2, {num_heads, head_dim}), std::nullopt, qkv[0], qkv[1], qkv[2],
            saved[0].unflatten(2, {num_heads, head_dim}), saved[1], call.segments, call.softmax_scale, mask,
            call.dropout_p, seed, dqkv[0], dqkv[1], dqkv[2]);
    for (size_t part = 0; part < num_parts; ++part) {
      if (drotated[part]) dbuffers[part].add_(*drotated[part]);
      if (freqs[part].defined()) {
        rotate_in_place(dbuffers[part], call.shapes[part], call.rotated[part], freqs[part], true);
      }
      result[part] = dbuffers[part];
    }
    return result;
  }
};

}  // namespace

std::vector<Tensor> project(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                            const std::vector<std::optional<Ranges>>& token_ranges, at::ScalarType dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  variable_list results = Project::apply(x, at::TensorList(weights), at::TensorList(biases), token_ranges, dtype);
  if (results.size() > weights.size()) results.erase(results.begin());  // the cast tokens
  return results;
}

std::vector<Tensor> attend_in_place(const std::vector<Tensor>& buffers, const OptionalTensors& freqs,
                                    const std::optional<Tensor>& key_padding_mask,
                                    const std::optional<Tensor>& dropout_seed, const PackedCall& call) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return AttendInPlace::apply(at::TensorList(buffers), freqs, key_padding_mask, dropout_seed, call);
}

void set_backward_composite(BackwardComposite composite) { backward_composite() = std::move(composite); }

}  // namespace mixed_attention
