// What the host hands to a kernel: pointers, shapes, strides. No torch, no device code, no methods.
#pragma once

#include <cstdint>

namespace mixed_attention {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct Schedule;  // schedule.h

// Strides of a (batch_size, seqlen, num_heads, head_dim) tensor in elements; its last dim is contiguous.
struct Strides {
  int64_t batch, row, head;
};

// Runs task(worker, context) for worker = 0 .. num_workers-1, concurrently where the host has the threads for it, one
// after the other where not; returns when all are done.
using ParallelFor = void (*)(int num_workers, void (*task)(int worker, void* context), void* context);

// The half of a problem that forward and backward share.
struct AttentionParams {
  DType dtype;
  int64_t batch_size, num_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;

  const void* q;  // (batch_size, seqlen_q, num_heads, head_dim)
  const void* k;  // (batch_size, seqlen_k, num_heads, head_dim), batch stride 0 where one sequence serves all
  const void* v;  // (batch_size, seqlen_k, num_heads, head_dim_v), likewise
  Strides q_strides, k_strides, v_strides;

  const bool* key_padding_mask;  // (batch_size, seqlen_k), true = real token, rows contiguous; or null
  int64_t key_padding_mask_batch_stride;

  double softmax_scale;         // not negative: q of a call whose scale is has the other sign (torch/call.h)
  double dropout_p;             // 0 = none; which weights are kept: reference.py, dropout_keep
  const int64_t* dropout_seed;  // one word, in the memory of the device; null without dropout

  const Schedule* schedule;

  // CPU
  ParallelFor parallel_for;
  int num_threads;
  // CUDA
  int device;
  void* stream;     // cudaStream_t
  void* workspace;  // device memory of as many bytes as the pass asks for (cuda/launch.h), 256-byte aligned
  bool allow_tf32;  // fp32 products may be rounded to TF32
};

struct FwdParams : AttentionParams {
  void* out;  // (batch_size, seqlen_q, num_heads, head_dim_v)
  void* lse;  // (batch_size, num_heads, seqlen_q), natural log, contiguous; fp32, fp64 for fp64
  Strides out_strides;
};

struct BwdParams : AttentionParams {
  const void* out;
  const void* lse;
  const void* dout;  // (batch_size, seqlen_q, num_heads, head_dim_v)
  const void* dlse;  // like lse, or null
  void* dq;          // (batch_size, seqlen_q, num_heads, head_dim)
  void* dk;          // (batch_size, seqlen_k, num_heads, head_dim), never broadcast
  void* dv;          // (batch_size, seqlen_k, num_heads, head_dim_v), never broadcast
  Strides out_strides, dout_strides, dq_strides, dk_strides, dv_strides;
  void* spare_out;  // out once more, contiguous, if its memory is the pass's to use as soon as it has read it; or null
  bool deterministic;
};

// Multiplies neighbouring channel pairs, read as complex numbers, by freqs or its conjugate.
struct RopeParams {
  DType dtype;
  int64_t batch_size, seqlen, num_heads, head_dim;
  const void* x;  // (batch_size, seqlen, num_heads, head_dim)
  void* out;      // likewise; may be x itself
  Strides x_strides, out_strides;
  const void* freqs;  // (batch_size, seqlen, head_dim / 2, 2) fp32, fp64 for fp64; rows contiguous
  int64_t freqs_batch_stride, freqs_row_stride;  // in real elements; batch stride 0 where one sequence serves all
  bool conjugate;

  ParallelFor parallel_for;
  int num_threads;
  int device;
  void* stream;
};

// Divides rows of a head by their root mean square, x / sqrt(mean(x^2) + eps), and then multiplies pairs as above, if
// there are freqs. eps is the distance of 1 to the next number of the arithmetic's dtype.
//
// With rows this is the derivative: `rows` are those that were divided, x is the gradient of the result, and out that
// of the rows. conjugate says then what it says of a result's gradient: the opposite of the forward.
struct RmsRopeParams : RopeParams {
  const void* rows;  // like x, or null
  Strides rows_strides;
};

}  // namespace mixed_attention
