#include "torch/attend_over_ranks.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <utility>

#include "torch/dispatched.h"
#include "torch/ops.h"
#include "torch/rotate.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

SpreadComposite& spread_composite() {
  static SpreadComposite composite;
  return composite;
}

// (batch_size, seqlen, slots, num_heads, head_dim): queries, and keys and values.
struct Slots {
  Tensor q, kv;
};

Slots slots_of(const variable_list& buffers, const PackedCall& call) {
  const Tensor first = buffers[0].view(call.shapes[0]);
  if (buffers.size() == 1) return {first.slice(2, 0, 1), first.slice(2, 1)};
  return {first, buffers[1].view(call.shapes[1])};
}

// Rows are the first dimension of what travels.
Tensor rows_first(const Tensor& tokens) { return tokens.transpose(0, 1); }

struct AttendedOverRanks {
  Tensor out, lse, whole;
  variable_list buffers;  // as they were read
  variable_list rotated;  // of those that have frequencies, what was read
  variable_list written;  // those of them that were rotated where they lie
};

AttendedOverRanks run_over_ranks(const variable_list& given, const OptionalTensors& freqs,
                                 const std::optional<Tensor>& dropout_seed, const SpreadCall& call) {
  const auto& op = dispatched<&mixed_attention::forward>("mixed_attention::forward");
  const WithoutAutocast no_autocast;
  const at::AutoDispatchBelowADInplaceOrView guard;
  AttendedOverRanks result{{}, {}, {}, given, {}, {}};
  const auto rotate = [&](size_t part) {
    if (!freqs[part]) return;
    Tensor& buffer = result.buffers[part];
    const PackedCall& here = call.here;
    if (is_seen(buffer)) {
      buffer = rotate_copy(buffer, here.shapes[part], here.rotated[part], *freqs[part], here.tokens[part]);
    } else {
      rotate_in_place(buffer, here.shapes[part], here.rotated[part], *freqs[part], here.tokens[part], false);
      result.written.push_back(buffer);
    }
  };
  rotate(given.size() - 1);
  const InFlight gather = start_gather({{rows_first(slots_of(result.buffers, call.here).kv)}}, *call.shards);
  if (given.size() > 1) rotate(0);
  result.whole = rows_first(finish_gather(gather, *call.shards)[0]);
  for (size_t part = 0; part < given.size(); ++part) {
    if (freqs[part]) result.rotated.push_back(result.buffers[part]);
  }
  const Tensor q = slots_of(result.buffers, call.here).q.select(2, 0);
  const auto [heads, lse] = op.call(q, result.whole.select(2, 0), result.whole.select(2, 1), call.attention.segments(),
                                    call.attention.softmax_scale, std::nullopt, call.attention.dropout_p, dropout_seed);
  result.out = heads.flatten(2);
  result.lse = lse;
  return result;
}

// NOTE: what is saved are the rotated buffers, as outputs, so that a second derivative finds the way through this
// node's own rotation, and a KV cache that is taken from them stays attached.
struct AttendOverRanks : torch::autograd::Function<AttendOverRanks> {
  static variable_list forward(AutogradContext* ctx, at::TensorList buffers, const OptionalTensors& freqs,
                               const std::optional<Tensor>& dropout_seed, const SpreadCall& call) {
    AttendedOverRanks attended = run_over_ranks(buffers.vec(), freqs, dropout_seed, call);
    ctx->mark_dirty(attended.written);
    ctx->set_materialize_grads(false);
    variable_list saved{attended.out, attended.lse, attended.whole, dropout_seed.value_or(Tensor())};
    saved.insert(saved.end(), attended.buffers.begin(), attended.buffers.end());
    for (const std::optional<Tensor>& each : freqs) saved.push_back(each.value_or(Tensor()));
    ctx->save_for_backward(saved);
    ctx->saved_data["call"] = Kept<SpreadCall>::make(call);
    attended.rotated.insert(attended.rotated.begin(), attended.out);
    return attended.rotated;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const SpreadCall& call = Kept<SpreadCall>::of(ctx->saved_data["call"]);
    const WithoutAutocast no_autocast;
    const Tensor &out = saved[0], &lse = saved[1], &whole = saved[2];
    const std::optional<Tensor> seed = optional_tensor(saved[3]);
    const size_t num_parts = call.here.shapes.size();
    const auto first = saved.begin() + 4;
    const variable_list buffers(first, first + num_parts);
    OptionalTensors freqs, drotated;
    for (size_t part = 0, next = 1; part < num_parts; ++part) {
      freqs.push_back(optional_tensor(first[num_parts + part]));
      drotated.push_back(freqs[part] ? optional_tensor(grads[next++]) : std::nullopt);
    }
    const Tensor dout = grads[0].defined() ? grads[0] : at::zeros_like(out);
    variable_list result;
    if (needs_composite(grads)) {
      result = spread_composite()(buffers, freqs, seed, call, out, lse, dout, drotated);
    } else {
      const at::AutoDispatchBelowADInplaceOrView guard;
      result = run_backward(buffers, freqs, seed, call, out, lse, whole, dout, drotated);
    }
    result.resize(num_parts + 3);
    return result;
  }

 private:
  static variable_list run_backward(const variable_list& buffers, const OptionalTensors& freqs,
                                    const std::optional<Tensor>& seed, const SpreadCall& call, const Tensor& out,
                                    const Tensor& lse, const Tensor& whole, const Tensor& dout,
                                    const OptionalTensors& drotated) {
    const auto& op = dispatched<&mixed_attention::backward_out>("mixed_attention::backward_out");
    variable_list dbuffers;
    for (const Tensor& buffer : buffers) dbuffers.push_back(at::empty_like(buffer));
    const Slots slots = slots_of(buffers, call.here), dslots = slots_of(dbuffers, call.here);
    const Tensor q = slots.q.select(2, 0);
    const std::array<int64_t, 2> heads{q.size(2), q.size(3)};
    const Tensor dwhole =
        at::empty(whole.sizes(), whole.options().dtype(takes_wide_keys(q) ? at::kFloat : q.scalar_type()));
    op.call(dout.unflatten(2, heads), std::nullopt, q, whole.select(2, 0), whole.select(2, 1), out.unflatten(2, heads),
            lse, call.attention.segments(), call.attention.softmax_scale, std::nullopt, call.attention.dropout_p, seed,
            dslots.q.select(2, 0), dwhole.select(2, 0), dwhole.select(2, 1));
    const auto rotate_back = [&](size_t part) {
      if (!freqs[part]) return;
      if (drotated[part]) dbuffers[part].add_(*drotated[part]);
      rotate_in_place(dbuffers[part], call.here.shapes[part], call.here.rotated[part], *freqs[part],
                      call.here.tokens[part], true);
    };
    const InFlight sums = start_sums({rows_first(dwhole)}, *call.shards, q.scalar_type());
    if (buffers.size() > 1) rotate_back(0);
    finish_sums_into(sums, *call.shards, rows_first(dslots.kv));
    rotate_back(buffers.size() - 1);
    return dbuffers;
  }
};

}  // namespace

variable_list attend_over_ranks(const variable_list& buffers, const OptionalTensors& freqs,
                                const std::optional<Tensor>& dropout_seed, const SpreadCall& call) {
  if (c10::GradMode::is_enabled()) {
    return AttendOverRanks::apply(at::TensorList(buffers), freqs, dropout_seed, call);
  }
  AttendedOverRanks attended = run_over_ranks(buffers, freqs, dropout_seed, call);
  for (const Tensor& each : attended.written) {
    if (!each.is_inference()) bump_version(each);
  }
  attended.rotated.insert(attended.rotated.begin(), attended.out);
  return attended.rotated;
}

void set_spread_composite(SpreadComposite composite) { spread_composite() = std::move(composite); }

}  // namespace mixed_attention
