// The differentiable steps of a layer in plain eager mode: few calls, little host time, nothing saved twice.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "torch/attend.h"
#include "torch/autograd.h"

namespace mixed_attention {

using Ranges = std::vector<std::pair<int64_t, int64_t>>;

// Some neighbouring rows of a weight, and the tokens that they see; all tokens without ranges.
struct ProjectedPart {
  int64_t row_begin, row_end;
  std::optional<Ranges> tokens;
};

// Products of tokens (batch_size, seqlen, channels) with parts of a weight, computed in one dtype. Differentiable in
// all tensors, any number of times.
//
// weight, bias: as nn.Linear has them. Rows that no part takes get zeros as gradient.
// Returns (batch_size, tokens seen, rows) for every part.
std::vector<at::Tensor> project(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                const std::vector<ProjectedPart>& parts, at::ScalarType dtype);

// What an attention over packed buffers computes, but for its tensors. See mixed_attention/eager/packed.py.
struct PackedCall : AttentionCall {
  std::vector<std::vector<int64_t>> shapes;   // of each buffer: batch_size, seqlen, slots, num_heads, head_dim
  std::vector<int64_t> rotated;               // how many of its first slots are rotated
  std::vector<std::optional<Ranges>> tokens;  // of those that frequencies are given for, if not all
};

// Rotates the buffers where they lie, those that have frequencies (batch_size or 1, tokens, head_dim / 2, 2), and
// attends. Returns the output (batch_size, seqlen_q, num_heads * head_dim), and the rotated buffers as parts of the
// graph.
std::vector<at::Tensor> attend_in_place(const std::vector<at::Tensor>& buffers, const OptionalTensors& freqs,
                                        const std::optional<at::Tensor>& key_padding_mask,
                                        const std::optional<at::Tensor>& dropout_seed, const PackedCall& call);

// The gradients of the buffers by operators that have derivatives themselves: what a second derivative goes through.
using BackwardComposite = std::function<OptionalTensors(
    const std::vector<at::Tensor>& buffers, const OptionalTensors& freqs,
    const std::optional<at::Tensor>& key_padding_mask, const std::optional<at::Tensor>& dropout_seed,
    const PackedCall& call, const at::Tensor& dout, const OptionalTensors& drotated)>;
void set_backward_composite(BackwardComposite composite);

}  // namespace mixed_attention
