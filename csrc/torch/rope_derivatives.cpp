#include "torch/rope_derivatives.h"

#include <ATen/DimVector.h>
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include "derivatives_params.h"
#include "torch/call.h"
#include "torch/checks.h"
#include "torch/ops.h"

namespace mixed_attention {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A tensor that is like another one, with directions in front where `count` says how many; -1 of one without.
OptionalTensor readable(const char* name, const OptionalTensor& tensor, const Tensor& like, const char* what,
                        int64_t& count) {
  if (!tensor) return std::nullopt;
  const bool has_directions = count >= 0;
  check_dense(name, *tensor);
  check_device(name, *tensor, like.device(), what);
  check_dtype(name, *tensor, like.scalar_type(), what);
  check_rank(name, *tensor, like.dim() + has_directions,
             has_directions ? "like what it moves, behind the directions" : "like x");
  at::DimVector expected(like.sizes());
  if (has_directions) {
    if (count == 0) count = tensor->size(0);
    TORCH_CHECK_VALUE(count > 0, name, ": expected at least one direction, got shape ", tensor->sizes());
    expected.insert(expected.begin(), count);
  }
  check_shape(name, *tensor, expected, what);
  check_memory(name, *tensor);
  return last_dim_contiguous(*tensor);
}

// How rows and frequencies move, in the params; owned as long as kernels run.
struct Motion {
  int64_t count = 0;  // of directions; first, as it is set while the others are checked
  OptionalTensor x_dot, freqs_dot;

  Motion(const Tensor& x, const Tensor& freqs, const OptionalTensor& x_moves, const OptionalTensor& freqs_moves)
      : x_dot(readable("x_dot", x_moves, x, "like x", count)),
        freqs_dot(readable("freqs_dot", freqs_moves, freqs, "like freqs", count)) {
    if (freqs_dot && freqs_dot->stride(3) != 2) freqs_dot = freqs_dot->contiguous();
  }

  void fill(RopeJvpParams& params) const {
    params.count = static_cast<int>(count);
    if (x_dot) {
      params.x_dot = x_dot->const_data_ptr();
      params.x_dot_strides = strides(x_dot->select(0, 0));
      params.x_dot_step = x_dot->stride(0);
    }
    if (freqs_dot) {
      params.freqs_dot = freqs_dot->const_data_ptr();
      params.freqs_dot_step = freqs_dot->stride(0);
      params.freqs_dot_batch_stride = freqs_dot->size(1) == 1 ? 0 : freqs_dot->stride(1);
      params.freqs_dot_row_stride = freqs_dot->stride(2);
    }
  }
};

// Memory for a result like a tensor, behind so many directions if it has some; of no elements where it is not wanted.
Tensor result(bool is_wanted, const Tensor& like, std::optional<int64_t> directions) {
  if (!is_wanted) return at::empty({0}, like.options());
  at::DimVector shape(like.sizes());
  if (directions) shape.insert(shape.begin(), *directions);
  return at::empty(shape, like.options());
}

void check_memory_of(const Tensor& x, const Tensor& freqs) {
  check_memory("x", x);
  check_memory("freqs", freqs);
}

}  // namespace

std::tuple<Tensor, Tensor> rope_jvp(const Tensor& x, const Tensor& freqs, const OptionalTensor& x_dot,
                                    const OptionalTensor& freqs_dot, bool conjugate, bool wants_out) {
  check_rank("x", x, 4, "(batch_size, seqlen, num_heads, head_dim)");
  const Tensor rows = last_dim_contiguous(x);
  check_rope(rows, freqs, rows);
  check_memory_of(rows, freqs);
  const Motion motion(x, freqs, x_dot, freqs_dot);
  TORCH_CHECK_VALUE(motion.count > 0, "x_dot: expected a tangent of x or freqs, got none");
  const c10::DeviceGuard guard(x.device());
  const Tensor out = result(wants_out, x, {}), out_dot = result(true, x, motion.count);
  RopeJvpParams params{};
  const Tensor read = fill(params, rows, freqs, conjugate);
  motion.fill(params);
  if (wants_out) {
    params.out = out.mutable_data_ptr();
    params.out_strides = strides(out);
  }
  params.out_dot = out_dot.mutable_data_ptr();
  params.out_dot_strides = strides(out_dot.select(0, 0));
  params.out_dot_step = out_dot.stride(0);
  run_rope_jvp(params, x);
  return {out, out_dot};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_backward(const OptionalTensor& dout, const OptionalTensor& dout_dot,
                                                         const Tensor& x, const Tensor& freqs,
                                                         const OptionalTensor& x_dot, const OptionalTensor& freqs_dot,
                                                         bool conjugate, std::array<bool, 4> wanted) {
  check_rank("x", x, 4, "(batch_size, seqlen, num_heads, head_dim)");
  const Tensor rows = last_dim_contiguous(x);
  check_rope(rows, freqs, rows);
  check_memory_of(rows, freqs);
  Motion motion(x, freqs, x_dot, freqs_dot);
  const auto [wants_dx, wants_dfreqs, wants_dx_dot, wants_dfreqs_dot] = wanted;
  TORCH_CHECK_VALUE(x_dot || !wants_dx_dot, "x_dot: expected a tensor, as its gradient is wanted, got None");
  TORCH_CHECK_VALUE(freqs_dot || !wants_dfreqs_dot,
                    "freqs_dot: expected a tensor, as its gradient is wanted, got None");
  TORCH_CHECK_VALUE(motion.count > 0 || !dout_dot, "x_dot: expected a tangent of x or freqs beside dout_dot, got none");
  int64_t no_directions = -1;
  const OptionalTensor dout_rows = readable("dout", dout, x, "like x", no_directions);
  const OptionalTensor dout_dot_rows = readable("dout_dot", dout_dot, x, "like x", motion.count);
  const c10::DeviceGuard guard(x.device());
  const Tensor dx = result(wants_dx, x, {}), dfreqs = result(wants_dfreqs, freqs, {});
  const Tensor dx_dot = result(wants_dx_dot, x, motion.count);
  const Tensor dfreqs_dot = result(wants_dfreqs_dot, freqs, motion.count);
  RopeBwdParams params{};
  const Tensor read = fill(params, rows, freqs, conjugate);
  motion.fill(params);
  params.shares_freqs = freqs.size(0) == 1;
  if (dout_rows) {
    params.dout = dout_rows->const_data_ptr();
    params.dout_strides = strides(*dout_rows);
  }
  if (dout_dot_rows) {
    params.dout_dot = dout_dot_rows->const_data_ptr();
    params.dout_dot_strides = strides(dout_dot_rows->select(0, 0));
    params.dout_dot_step = dout_dot_rows->stride(0);
  }
  if (wants_dx) params.dx = dx.mutable_data_ptr();
  if (wants_dfreqs) params.dfreqs = dfreqs.mutable_data_ptr();
  if (wants_dx_dot) params.dx_dot = dx_dot.mutable_data_ptr();
  if (wants_dfreqs_dot) params.dfreqs_dot = dfreqs_dot.mutable_data_ptr();
  run_rope_backward(params, x);
  return {dx, dfreqs, dx_dot, dfreqs_dot};
}

}  // namespace mixed_attention
