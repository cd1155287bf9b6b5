// Rotation and attention over packed buffers as one node of the graph.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <vector>

#include "torch/attend.h"
#include "torch/autograd.h"
#include "torch/tokens.h"

namespace mixed_attention {

// What an attention over packed buffers computes, but for its tensors. See mixed_attention/eager/packed.py.
struct PackedCall : AttentionCall {
  std::vector<std::vector<int64_t>> shapes;   // of each buffer: batch_size, seqlen, slots, num_heads, head_dim
  std::vector<int64_t> normalised;            // how many of its first slots are divided by their root mean square
  std::vector<int64_t> rotated;               // how many are rotated then; as many where any are divided
  std::vector<std::optional<Ranges>> tokens;  // of those that frequencies are given for, if not all
};

// Rotates the buffers where they lie, those that have frequencies (batch_size or 1, tokens, head_dim / 2, 2), and
// attends. Slots that are normalised are rotated into memory of their own, since their derivative is told from what was
// divided. Returns the output (batch_size, seqlen_q, num_heads * head_dim), and the rotated buffers, or the normalised
// slots of them, as parts of the graph.
std::vector<at::Tensor> attend_in_place(const std::vector<at::Tensor>& buffers, const OptionalTensors& freqs,
                                        const std::optional<at::Tensor>& key_padding_mask,
                                        const std::optional<at::Tensor>& dropout_seed, const PackedCall& call);

// The gradients of the buffers by operators that have derivatives themselves: what a second derivative goes through.
using BackwardComposite = std::function<OptionalTensors(
    const std::vector<at::Tensor>& buffers, const OptionalTensors& freqs,
    const std::optional<at::Tensor>& key_padding_mask, const std::optional<at::Tensor>& dropout_seed,
    const PackedCall& call, const at::Tensor& out, const at::Tensor& lse, const at::Tensor& dout,
    const OptionalTensors& normalised, const OptionalTensors& drotated)>;
void set_backward_composite(BackwardComposite composite);

}  // namespace mixed_attention
