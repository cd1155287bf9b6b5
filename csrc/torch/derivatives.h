// The operators of derivatives beyond the first: tangents of the forward, and gradients of them.
//
// Tangents have a dim in front, of as many directions as share one primal: (T, batch_size, ...). Where q, k or v stays
// in all of them there is no tangent of it; one of the three is there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace mixed_attention {

// out, lse, and how they move.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_jvp(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& q_dot,
    const std::optional<at::Tensor>& k_dot, const std::optional<at::Tensor>& v_dot, at::IntArrayRef segments,
    double softmax_scale, const std::optional<at::Tensor>& key_padding_mask, double dropout_p,
    const std::optional<at::Tensor>& dropout_seed);

// How they move, of a forward that was.
std::tuple<at::Tensor, at::Tensor> jvp(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const at::Tensor& out, const at::Tensor& lse,
                                       const std::optional<at::Tensor>& q_dot, const std::optional<at::Tensor>& k_dot,
                                       const std::optional<at::Tensor>& v_dot, at::IntArrayRef segments,
                                       double softmax_scale, const std::optional<at::Tensor>& key_padding_mask,
                                       double dropout_p, const std::optional<at::Tensor>& dropout_seed);

// Gradients of q, k and v of <dout, out> + <dlse, lse> + <dout_dot, out_dot> + <dlse_dot, lse_dot>, where out and lse
// are functions of q, k and v, and the last two of the tangents as well. With wants_dq_dot that of q_dot, too; else it
// has no directions.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_jvp(
    const at::Tensor& dout_dot, const std::optional<at::Tensor>& dlse_dot, const std::optional<at::Tensor>& dout,
    const std::optional<at::Tensor>& dlse, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse, const std::optional<at::Tensor>& q_dot,
    const std::optional<at::Tensor>& k_dot, const std::optional<at::Tensor>& v_dot, const at::Tensor& out_dot,
    const at::Tensor& lse_dot, at::IntArrayRef segments, double softmax_scale,
    const std::optional<at::Tensor>& key_padding_mask, double dropout_p, const std::optional<at::Tensor>& dropout_seed,
    bool wants_dq_dot);

// Throw what the operators throw of arguments that the forward does not have, without computing. forward: out and lse,
// or neither.
void check_jvp(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& out,
               const std::optional<at::Tensor>& lse, const std::optional<at::Tensor>& q_dot,
               const std::optional<at::Tensor>& k_dot, const std::optional<at::Tensor>& v_dot);
void check_backward_jvp(const at::Tensor& dout_dot, const std::optional<at::Tensor>& dlse_dot,
                        const std::optional<at::Tensor>& dout, const std::optional<at::Tensor>& dlse,
                        const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                        const at::Tensor& lse, const std::optional<at::Tensor>& q_dot,
                        const std::optional<at::Tensor>& k_dot, const std::optional<at::Tensor>& v_dot,
                        const at::Tensor& out_dot, const at::Tensor& lse_dot, bool wants_dq_dot);

}  // namespace mixed_attention
