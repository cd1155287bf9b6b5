#include "torch/attend_in_place.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "torch/checks.h"
#include "torch/dispatched.h"
#include "torch/ops.h"
#include "torch/rotate.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// q, k and v: of each buffer its slots, the first of them as they were normalised, if they were.
std::vector<Tensor> slots(at::TensorList buffers, const std::vector<std::vector<int64_t>>& shapes,
                          const OptionalTensors& normalised = {}) {
  std::vector<Tensor> found;
  for (size_t part = 0; part < buffers.size(); ++part) {
    const Tensor packed = buffers[part].view(shapes[part]);
    const bool is_normalised = !normalised.empty() && normalised[part];
    const int64_t made = is_normalised ? normalised[part]->size(2) : 0;
    for (int64_t slot = 0; slot < packed.size(2); ++slot) {
      found.push_back((slot < made ? *normalised[part] : packed).select(2, slot));
    }
  }
  return found;
}

// Rows in the dtype of the arithmetic over their root mean square, and what they were multiplied by for that.
std::pair<Tensor, Tensor> normed_rows(const Tensor& heads) {
  const Tensor wide = heads.to(heads.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const double eps = wide.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                       : std::numeric_limits<float>::epsilon();
  const Tensor rstd = (wide.square().sum(-1, /*keepdim=*/true) / heads.size(-1) + eps).rsqrt();
  return {wide * rstd, rstd};
}

// The first slots (batch_size, seqlen, slots, num_heads, head_dim), normalised and rotated. By operations that others
// see where somebody watches, as the kernel is no operator.
Tensor normalise(const Tensor& buffer, const std::vector<int64_t>& shape, int64_t count,
                 const std::optional<Tensor>& freqs, const std::optional<Ranges>& tokens) {
  const Tensor heads = first_heads(buffer, shape, count);
  if (is_watched()) {
    const Tensor normed = normed_rows(heads).first.to(heads.scalar_type());
    return rotated(normed, freqs, tokens, false).reshape({shape[0], shape[1], count, shape[3], shape[4]});
  }
  const Tensor made = at::empty({shape[0], shape[1], count, shape[3], shape[4]}, buffer.options());
  const Tensor made_heads = made.flatten(2, 3);
  for_each_run(freqs, tokens, shape[1], [&](int64_t begin, int64_t end, const std::optional<Tensor>& of_rows) {
    rms_rope_out(heads.slice(1, begin, end), of_rows, made_heads.slice(1, begin, end));
  });
  return made;
}

// Turns the gradient of what that made into that of the buffer, where it lies.
void normalise_back(const Tensor& buffer, const Tensor& dbuffer, const std::vector<int64_t>& shape, int64_t count,
                    const std::optional<Tensor>& freqs, const std::optional<Ranges>& tokens) {
  const Tensor heads = first_heads(buffer, shape, count), dheads = first_heads(dbuffer, shape, count);
  if (is_watched()) {
    const auto [normed, rstd] = normed_rows(heads);
    const Tensor dnormed = rotated(dheads, freqs, tokens, true).to(normed.scalar_type());
    const Tensor along = (dnormed * normed).sum(-1, /*keepdim=*/true) / heads.size(-1);
    dheads.copy_(rstd * (dnormed - normed * along));
    return;
  }
  for_each_run(freqs, tokens, shape[1], [&](int64_t begin, int64_t end, const std::optional<Tensor>& of_rows) {
    rms_rope_backward(heads.slice(1, begin, end), of_rows, dheads.slice(1, begin, end));
  });
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

struct Attended {
  Tensor out, lse;
  variable_list buffers;       // as they were read
  OptionalTensors normalised;  // what was read in place of their first slots
  variable_list rotated;       // of those that have frequencies or norms, what was read
  variable_list written;       // those of them that were rotated where they lie
};

// Rotates the buffers that have frequencies, where they lie if nobody sees it, and attends.
Attended run_attend(at::TensorList given, const OptionalTensors& freqs, const std::optional<Tensor>& key_padding_mask,
                    const std::optional<Tensor>& dropout_seed, const PackedCall& call) {
  const auto& op = dispatched<&mixed_attention::forward>("mixed_attention::forward");
  const WithoutAutocast no_autocast;
  const at::AutoDispatchBelowADInplaceOrView guard;
  Attended result{{}, {}, given.vec(), OptionalTensors(given.size()), {}, {}};
  for (size_t part = 0; part < given.size(); ++part) {
    if (call.normalised[part] > 0) {
      result.normalised[part] =
          normalise(given[part], call.shapes[part], call.normalised[part], freqs[part], call.tokens[part]);
      result.rotated.push_back(*result.normalised[part]);
      continue;
    }
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
  const std::vector<Tensor> qkv = slots(result.buffers, call.shapes, result.normalised);
  const auto [heads, lse] = op.call(qkv[0], qkv[1], qkv[2], call.segments(), call.softmax_scale, key_padding_mask,
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
    for (const OptionalTensors& tensors : {freqs, attended.normalised}) {
      for (const std::optional<Tensor>& each : tensors) saved.push_back(each.value_or(Tensor()));
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["state"] = Kept<AttendState>::make({call, {}});
    attended.rotated.insert(attended.rotated.begin(), attended.out);
    return attended.rotated;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    AttendState& state = Kept<AttendState>::of(ctx->saved_data["state"]);
    state.memory.check();
    const WithoutAutocast no_autocast;
    const PackedCall& call = state.call;
    const size_t num_parts = call.shapes.size();
    const auto first = saved.begin() + 4;
    const variable_list buffers(first, first + num_parts);
    const OptionalTensors freqs = optional_tensors(first + num_parts, num_parts);
    const OptionalTensors normalised = optional_tensors(first + 2 * num_parts, num_parts);
    const std::optional<Tensor> mask = optional_tensor(saved[2]), seed = optional_tensor(saved[3]);
    OptionalTensors drotated;  // of every buffer, also those that are no outputs because nothing rotates them
    size_t next = 1;
    for (size_t part = 0; part < num_parts; ++part) {
      const bool is_output = freqs[part] || normalised[part];
      drotated.push_back(is_output ? optional_tensor(grads[next++]) : std::nullopt);
    }
    variable_list result(num_parts + 4);
    if (needs_composite(grads)) {
      const Tensor dout = grads[0].defined() ? grads[0] : at::zeros_like(saved[0]);
      const OptionalTensors found =
          backward_composite()(buffers, freqs, mask, seed, call, saved[0], saved[1], dout, normalised, drotated);
      for (size_t part = 0; part < num_parts; ++part) result[part] = found[part].value_or(Tensor());
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    variable_list dbuffers = grads[0].defined() ? attend_back(ctx, saved, state, buffers, freqs, normalised, grads[0])
                                                : variable_list(num_parts);
    for (size_t part = 0; part < num_parts; ++part) {
      if (!dbuffers[part].defined()) {  // a second derivative, say, which reaches rotated rows and not the output
        if (!drotated[part]) continue;
        dbuffers[part] = at::zeros_like(buffers[part]);
      }
      if (normalised[part]) {
        if (drotated[part]) {
          first_heads(dbuffers[part], call.shapes[part], call.normalised[part]).add_(drotated[part]->flatten(2, 3));
        }
        normalise_back(buffers[part], dbuffers[part], call.shapes[part], call.normalised[part], freqs[part],
                       call.tokens[part]);
      } else if (freqs[part]) {
        if (drotated[part]) dbuffers[part].add_(*drotated[part]);
        rotate_in_place(dbuffers[part], call.shapes[part], call.rotated[part], *freqs[part], call.tokens[part], true);
      }
      result[part] = dbuffers[part];
    }
    return result;
  }

 private:
  // Gradients of all buffers as they went into the attention, by one of the kernels; in their place where it may.
  static variable_list attend_back(AutogradContext* ctx, const variable_list& saved, AttendState& state,
                                   const variable_list& buffers, const OptionalTensors& freqs,
                                   const OptionalTensors& normalised, const Tensor& dout) {
    const PackedCall& call = state.call;
    const size_t num_parts = buffers.size();
    const std::optional<Tensor> mask = optional_tensor(saved[2]), seed = optional_tensor(saved[3]);
    // Outputs are those buffers that were rotated. The projection that took the output has run by now, and holds it no
    // more. What was normalised is needed behind the kernels.
    bool may_overwrite_buffers = state.memory.may_be_given<AttendInPlace>(ctx);
    for (size_t part = 0; part < num_parts; ++part) {
      may_overwrite_buffers =
          may_overwrite_buffers && freqs[part] && !normalised[part] && is_seen_by_nobody_else(buffers[part]);
    }
    const bool may_overwrite_out = may_overwrite_buffers && is_seen_by_nobody_else(saved[0]);
    const int64_t num_heads = call.shapes[0][3], head_dim = call.shapes[0][4];
    const Tensor dheads = dout.unflatten(2, {num_heads, head_dim}),
                 heads = saved[0].unflatten(2, {num_heads, head_dim});
    const std::vector<Tensor> qkv = slots(buffers, call.shapes, normalised);
    variable_list dbuffers;
    if (may_overwrite_buffers) state.memory.give();
    if (may_overwrite_buffers &&
        backward_in_place(dheads, std::nullopt, qkv[0], qkv[1], qkv[2], heads, saved[1], call.segments(),
                          call.softmax_scale, mask, call.dropout_p, seed, may_overwrite_out)) {
      for (const Tensor& buffer : buffers) dbuffers.push_back(buffer.detach());
    } else {
      state.memory.take_back();
      for (const Tensor& buffer : buffers) dbuffers.push_back(at::empty_like(buffer));
      const auto& op = dispatched<&mixed_attention::backward_out>("mixed_attention::backward_out");
      const std::vector<Tensor> dqkv = slots(dbuffers, call.shapes);
      op.call(dheads, std::nullopt, qkv[0], qkv[1], qkv[2], heads, saved[1], call.segments(), call.softmax_scale, mask,
              call.dropout_p, seed, dqkv[0], dqkv[1], dqkv[2]);
    }
    return dbuffers;
  }
};

void check_packed(at::TensorList buffers, const OptionalTensors& freqs, const PackedCall& call) {
  const size_t num_parts = buffers.size();
  TORCH_CHECK_VALUE(freqs.size() == num_parts && call.shapes.size() == num_parts && call.rotated.size() == num_parts &&
                        call.tokens.size() == num_parts,
                    "call: expected as many freqs, shapes, rotated and tokens as there are buffers, ", num_parts,
                    ", got ", freqs.size(), ", ", call.shapes.size(), ", ", call.rotated.size(), " and ",
                    call.tokens.size());
  TORCH_CHECK_VALUE(call.normalised.size() == num_parts, "call: expected as many normalised as there are buffers, ",
                    num_parts, ", got ", call.normalised.size());
  int64_t num_slots = 0;
  for (size_t part = 0; part < num_parts; ++part) {
    const at::IntArrayRef shape = call.shapes[part];
    TORCH_CHECK_VALUE(shape.size() == 5 && std::all_of(shape.begin(), shape.end(), [](int64_t n) { return n >= 0; }),
                      "shapes: expected (batch_size, seqlen, slots, num_heads, head_dim), got ", shape);
    TORCH_CHECK_VALUE(buffers[part].defined() && buffers[part].numel() == c10::multiply_integers(shape),
                      "buffers: expected as many numbers as shape ", shape, " has, got ",
                      buffers[part].defined() ? buffers[part].numel() : 0);
    num_slots += shape[2];
    const int64_t normalised = call.normalised[part];
    TORCH_CHECK_VALUE(0 <= normalised && normalised <= shape[2] && (normalised == 0 || shape[4] % 2 == 0),
                      "normalised: expected at most ", shape[2], " slots, and an even head_dim, got ", normalised,
                      " of shape ", shape);
    if (!freqs[part] && normalised == 0) continue;
    TORCH_CHECK_VALUE(buffers[part].is_contiguous(), "buffers: expected contiguous ones to rotate, got strides ",
                      buffers[part].strides());
    if (!freqs[part]) continue;
    TORCH_CHECK_VALUE(normalised == 0 || normalised == call.rotated[part], "rotated: expected the ", normalised,
                      " slots that are normalised, got ", call.rotated[part]);
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

std::vector<Tensor> attend_in_place(const std::vector<Tensor>& buffers, const OptionalTensors& freqs,
                                    const std::optional<Tensor>& key_padding_mask,
                                    const std::optional<Tensor>& dropout_seed, const PackedCall& call) {
  check_packed(buffers, freqs, call);
  if (!c10::GradMode::is_enabled()) {
    Attended attended = run_attend(buffers, freqs, key_padding_mask, dropout_seed, call);
    for (const Tensor& each : attended.written) {
      if (!each.is_inference()) bump_version(each);
    }
    attended.rotated.insert(attended.rotated.begin(), attended.out);
    return attended.rotated;
  }
  return AttendInPlace::apply(at::TensorList(buffers), freqs, key_padding_mask, dropout_seed, call);
}

void set_backward_composite(BackwardComposite composite) { backward_composite() = std::move(composite); }

}  // namespace mixed_attention
