// The torch side of a call: what bindings.cpp exposes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace mixed_attention {

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           at::IntArrayRef segments, double softmax_scale,
                                           const std::optional<at::Tensor>& key_padding_mask, double dropout_p,
                                           const std::optional<at::Tensor>& dropout_seed);

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& dlse, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse, at::IntArrayRef segments, double softmax_scale,
    const std::optional<at::Tensor>& key_padding_mask, double dropout_p, const std::optional<at::Tensor>& dropout_seed);

// The same, into tensors of the caller's: slices of one packed gradient, say. They share memory with nothing else.
// Where takes_wide_keys, dk and dv may both be of fp32: sums that nobody has rounded.
void backward_out(const at::Tensor& dout, const std::optional<at::Tensor>& dlse, const at::Tensor& q,
                  const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                  at::IntArrayRef segments, double softmax_scale, const std::optional<at::Tensor>& key_padding_mask,
                  double dropout_p, const std::optional<at::Tensor>& dropout_seed, const at::Tensor& dq,
                  const at::Tensor& dk, const at::Tensor& dv);

// Whether a backward can leave dk and dv in fp32 beside 16 bits: kernels of CPUs add them up in it, and store them
// once.
bool takes_wide_keys(const at::Tensor& q);

// The same, over the inputs: dq where q lies, dk where k does, dv where v does. If allowed to, it may leave anything
// where out lies. False, and nothing done, where no kernel can.
bool backward_in_place(const at::Tensor& dout, const std::optional<at::Tensor>& dlse, const at::Tensor& q,
                       const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                       at::IntArrayRef segments, double softmax_scale,
                       const std::optional<at::Tensor>& key_padding_mask, double dropout_p,
                       const std::optional<at::Tensor>& dropout_seed, bool may_overwrite_out);

// Multiplies channel pairs by freqs, or its conjugate; into out, which may be x itself, or shares no memory with it.
at::Tensor rope(const at::Tensor& x, const at::Tensor& freqs, bool conjugate);
void rope_out(const at::Tensor& x, const at::Tensor& freqs, bool conjugate, const at::Tensor& out);

// Divides rows of a head by their root mean square and rotates them by freqs, if there are any; into out, which may be
// x itself. The backward turns the gradient of that into that of x, where it lies. Steps of attend_in_place, not
// operators.
void rms_rope_out(const at::Tensor& x, const std::optional<at::Tensor>& freqs, const at::Tensor& out);
void rms_rope_backward(const at::Tensor& x, const std::optional<at::Tensor>& freqs, const at::Tensor& grad);

// Rounds fp32 tensors to those of 16 bits beside them, by one launch for all. False, and nothing done, where no kernel
// can: on CPUs, for other dtypes, for tensors that are not contiguous, and for very many.
bool cast_by_one_launch(at::TensorList from, at::TensorList to);

// The sums of a matrix' columns in fp32, by one launch. Undefined where no kernel can: on CPUs, for other dtypes than
// those of 16 bits, and for rows that do not lie as the kernel reads them.
at::Tensor sum_columns(const at::Tensor& rows);

// Throw what the operators would throw, without computing and without a look at memory: for the paths that do not reach
// a kernel. What depends on symbolic sizes is left to the kernels. grads: dq, dk and dv, or none.
void check_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, c10::SymIntArrayRef segments,
                   double softmax_scale, const std::optional<at::Tensor>& key_padding_mask, double dropout_p,
                   const std::optional<at::Tensor>& dropout_seed);
void check_backward(const at::Tensor& dout, const std::optional<at::Tensor>& dlse, const at::Tensor& q,
                    const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                    c10::SymIntArrayRef segments, double softmax_scale,
                    const std::optional<at::Tensor>& key_padding_mask, double dropout_p,
                    const std::optional<at::Tensor>& dropout_seed, at::TensorList grads);
void check_rope(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& out);

// Family of the CUDA kernels that serves a problem, "portable", "hopper" or "none", and why no faster one does. With
// tangents: of the operators of derivatives beyond the first.
std::pair<std::string, std::string> cuda_kernel(at::ScalarType dtype, int64_t head_dim, int64_t head_dim_v, int device,
                                                bool backward, bool tangents);

// How a call of contiguous tensors is served: the family, why no faster one, and how it goes about it: rows of a tile,
// rows that it takes up at a time, parts that its walk is cut into, tiles, how many of them the device works on at a
// time, and how many are cut. shape: batch_size, num_heads, seqlen_q, seqlen_k, head_dim, head_dim_v. With tangents: of
// the operators of derivatives beyond the first, in one direction.
using CudaLaunch = std::tuple<std::string, std::string, int, int, int, int64_t, int, int64_t>;
CudaLaunch cuda_launch(at::ScalarType dtype, std::array<int64_t, 6> shape, at::IntArrayRef segments, int device,
                       bool backward, bool tangents);

}  // namespace mixed_attention
