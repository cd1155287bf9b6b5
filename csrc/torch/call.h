// What calls of the operators share: inputs that were checked, and params filled from them.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>

#include "params.h"
#include "torch/schedules.h"

namespace mixed_attention {

// Owns what the params point to.
struct Call {
  at::Tensor q, k, v, key_padding_mask, dropout_seed;
  std::shared_ptr<const Schedule> schedule;
};

// Checks all that an operator is given for a forward, and its memory.
Call prepare(Pass pass, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef segments,
             double softmax_scale, const std::optional<at::Tensor>& key_padding_mask, double dropout_p,
             const std::optional<at::Tensor>& dropout_seed);
void fill(AttentionParams& params, const Call& call, double softmax_scale, double dropout_p);

Strides strides(const at::Tensor& tensor);
at::Tensor last_dim_contiguous(const at::Tensor& tensor);
at::ScalarType lse_dtype(const at::Tensor& q);

// A gradient of (batch_size, ...) for an input that one sequence of the batch stands for.
at::Tensor sum_broadcast(const at::Tensor& grad, const at::Tensor& input);

}  // namespace mixed_attention
