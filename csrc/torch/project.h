// The projection of tokens as one node of the graph.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "torch/tokens.h"

namespace mixed_attention {

// Some neighbouring rows of a weight, and the tokens that they see; all tokens without ranges.
struct ProjectedPart {
  int64_t row_begin, row_end;
  std::optional<Ranges> tokens;
};

// Tensors in another dtype, those that have it as they are. The others take one launch together where they can.
std::vector<at::Tensor> cast_all(const std::vector<at::Tensor>& tensors, at::ScalarType dtype);

// Products of tokens (batch_size, seqlen, channels) with parts of a weight, computed in one dtype. Differentiable in
// all tensors, any number of times.
//
// weight, bias: as nn.Linear has them. Rows that no part takes get zeros as gradient.
// Returns (batch_size, tokens seen, rows) for every part.
std::vector<at::Tensor> project(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                const std::vector<ProjectedPart>& parts, at::ScalarType dtype);

// The same where tokens, weight and bias were cast before, together with others. cast: these, without a graph.
std::vector<at::Tensor> project_cast(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, const std::vector<ProjectedPart>& parts,
                                     const std::vector<at::Tensor>& cast);

}  // namespace mixed_attention
