// Inputs and outputs of the kernels of derivatives beyond the first, beside those of params.h.
#pragma once

#include <cstdint>

#include "params.h"

namespace mixed_attention {

// Directions that one call takes; one alone in the backward on GPUs. Their sums stay close to those of the primal, in
// L2 say.
inline constexpr int kMaxTangents = 3;

// How q, k and v move, in so many directions at once, that share their scores and weights. Each pointer is null where
// all directions leave that tensor where it is; a step leads from one direction to the next, in elements.
struct Tangents {
  int count;      // 1 to kMaxTangents
  const void* q;  // (count, batch_size, seqlen_q, num_heads, head_dim)
  const void* k;  // (count, batch_size, seqlen_k, num_heads, head_dim), batch stride 0 where one sequence serves all
  const void* v;  // (count, batch_size, seqlen_k, num_heads, head_dim_v), likewise
  Strides q_strides, k_strides, v_strides;
  int64_t q_step, k_step, v_step;
};

// How out and lse move with q, k and v. With lse_is_known, out and lse are there and may be read; else they are
// written.
struct JvpParams : FwdParams {
  Tangents tangents;
  bool lse_is_known;
  void* out_dot;  // (count, batch_size, seqlen_q, num_heads, head_dim_v)
  void* lse_dot;  // (count, batch_size, num_heads, seqlen_q), contiguous; 0 for rows without keys
  Strides out_dot_strides;
  int64_t out_dot_step, lse_dot_step;
};

// The gradient of <dout, out> + <dlse, lse> + sum over directions of <dout_dot, out_dot> + <dlse_dot, lse_dot>, with
// respect to q, k, v and, where wanted, the tangents of q. Here dout, as dlse, may be null.
struct BwdJvpParams : BwdParams {
  Tangents tangents;
  const void* out_dot;
  const void* lse_dot;
  const void* dout_dot;  // (count, batch_size, seqlen_q, num_heads, head_dim_v)
  const void* dlse_dot;  // like lse_dot, or null
  void* dq_dot;          // (count, batch_size, seqlen_q, num_heads, head_dim), or null
  Strides out_dot_strides, dout_dot_strides, dq_dot_strides;
  int64_t out_dot_step, lse_dot_step, dout_dot_step, dlse_dot_step, dq_dot_step;
};

// How a rotation moves with what is rotated and by what. out is null where it is not wanted. Each tensor in directions
// is null where all of them leave it where it is; a step leads from one direction to the next, in elements.
struct RopeJvpParams : RopeParams {
  int count;              // of directions; 0 for the gradient of a rotation without tangents
  const void* x_dot;      // (count, batch_size, seqlen, num_heads, head_dim)
  const void* freqs_dot;  // (count, batch_size, seqlen, head_dim / 2, 2), batch stride 0 where one sequence serves all
  void* out_dot;          // (count, batch_size, seqlen, num_heads, head_dim)
  Strides x_dot_strides, out_dot_strides;
  int64_t freqs_dot_batch_stride, freqs_dot_row_stride;
  int64_t x_dot_step, freqs_dot_step, out_dot_step;
};

// The gradient of <dout, out> + sum over directions of <dout_dot, out_dot>, with respect to all that these are made of.
// Either of dout and dout_dot may be null, and gradients that nobody wants are. out and out_dot are not looked at.
struct RopeBwdParams : RopeJvpParams {
  const void* dout;      // (batch_size, seqlen, num_heads, head_dim)
  const void* dout_dot;  // (count, batch_size, seqlen, num_heads, head_dim)
  Strides dout_strides, dout_dot_strides;
  int64_t dout_dot_step;
  void* dx;           // (batch_size, seqlen, num_heads, head_dim), contiguous
  void* dx_dot;       // (count, batch_size, seqlen, num_heads, head_dim), contiguous
  void* dfreqs;       // (batch_size, seqlen, head_dim / 2, 2) like freqs, contiguous; batch_size 1 with shares_freqs
  void* dfreqs_dot;   // (count, batch_size, seqlen, head_dim / 2, 2), likewise
  bool shares_freqs;  // whether one sequence of frequencies serves the batch
};

}  // namespace mixed_attention
