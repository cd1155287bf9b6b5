// The operators of a rotation's derivatives: with its tangents, and the gradient of both.
//
// Tangents have a dim of directions in front, as those of attention (torch/derivatives.h). Where rows or frequencies
// stay in all directions there is no tangent of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace mixed_attention {

// out, of no elements unless it is wanted, and how it moves.
std::tuple<at::Tensor, at::Tensor> rope_jvp(const at::Tensor& x, const at::Tensor& freqs,
                                            const std::optional<at::Tensor>& x_dot,
                                            const std::optional<at::Tensor>& freqs_dot, bool conjugate, bool wants_out);

// Gradients of x, freqs, x_dot and freqs_dot of <dout, out> + <dout_dot, out_dot>, either of which may be missing.
// Those that are not wanted have no elements.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rope_backward(const std::optional<at::Tensor>& dout,
                                                                         const std::optional<at::Tensor>& dout_dot,
                                                                         const at::Tensor& x, const at::Tensor& freqs,
                                                                         const std::optional<at::Tensor>& x_dot,
                                                                         const std::optional<at::Tensor>& freqs_dot,
                                                                         bool conjugate, std::array<bool, 4> wanted);

}  // namespace mixed_attention
