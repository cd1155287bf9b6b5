// What calls of the operators share: inputs that were checked, and params filled from them.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>

#include "derivatives_params.h"
#include "params.h"
#include "torch/schedules.h"

namespace mixed_attention {

// What a call comes to. It owns what the params point to.
//
// No kernel knows a negative scale: with -scale for scale and -q for q the scores are the same, bit by bit. What is
// made of q, or in its place, then has the other sign as well: tangents of q, dq, and tangents of dq.
struct Call {
  at::Tensor q, k, v, key_padding_mask, dropout_seed;
  std::shared_ptr<const Schedule> schedule;
  double softmax_scale, dropout_p;  // the former is not negative
  bool negates_q;

  // A tensor in the place of q as kernels get it.
  at::Tensor like_q(const at::Tensor& given) const;
  // Gives a tensor in the place of q, as kernels made it, the sign that the caller expects.
  void restore_like_q(const at::Tensor& made) const;
};

// Checks all that an operator is given for a forward, and its memory.
Call prepare(Pass pass, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef segments,
             double softmax_scale, const std::optional<at::Tensor>& key_padding_mask, double dropout_p,
             const std::optional<at::Tensor>& dropout_seed);
void fill(AttentionParams& params, const Call& call);

// Run the kernels of q's device.
void run_jvp(JvpParams& params, const at::Tensor& q);
void run_bwd_jvp(BwdJvpParams& params, const at::Tensor& q);

// Fills all but results. Returns what the params point to beside x, if there are frequencies.
at::Tensor fill(RopeParams& params, const at::Tensor& x, const std::optional<at::Tensor>& freqs, bool conjugate);
void run_rope_jvp(const RopeJvpParams& params, const at::Tensor& x);
void run_rope_backward(const RopeBwdParams& params, const at::Tensor& x);

Strides strides(const at::Tensor& tensor);
at::Tensor last_dim_contiguous(const at::Tensor& tensor);
at::ScalarType lse_dtype(const at::Tensor& q);

// A gradient of (batch_size, ...) for an input that one sequence of the batch stands for.
at::Tensor sum_broadcast(const at::Tensor& grad, const at::Tensor& input);

}  // namespace mixed_attention
