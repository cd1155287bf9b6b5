// Backward, in two forms. Both recompute p out of the log-sum-exps, behind a small kernel that prepares
// two numbers for each query.
//
// The faster form is one kernel over tiles of keys: it owns dk and dv and adds what it knows of dq to dq_accum, in
// whatever order the thread blocks come. The deterministic form computes dq in a second kernel, over tiles of queries,
// at the price of two of then seven MMAs: nothing is added atomically, and repeats are bitwise equal.
//
// With m dropout's factors and dp = dout · vᵀ:  ds = p (m dp - delta), delta = Σ out dout - dlse,
// dv = (m p)ᵀ dout, dk = scale dsᵀ q, dq = scale ds k.
#pragma once

#include <numbers>

#include "cuda/common/row_reference.h"
#include "cuda/portable/dq_accum.cuh"
#include "cuda/portable/dropout.cuh"
#include "cuda/portable/tile_iterator.cuh"

namespace mixed_attention::cuda::portable {

inline constexpr float kLog2E = std::numbers::log2e_v<float>;

struct BwdArguments {
  BwdParams params;
  DeviceWork work;
  DropoutParams dropout;
  float softmax_scale, scale_log2;
  bool aligned;  // rows of all tensors start at multiples of 16 bytes
  float unit;    // by how much tensor cores may be off, relative to the sum of |q k|
  // BwdBuffers say more of these.
  float* lse_log2;           // (batch_size, num_heads, seqlen_q)
  float* delta;              // likewise
  RowReference* references;  // likewise
  int* has_references;       // one word
  float* partial_dq;         // (splits, batch_size, num_heads, seqlen_q, head_dim)
  float* partial_dk;         // (splits, batch_size, num_heads, seqlen_k, head_dim)
  float* partial_dv;         // (splits, batch_size, num_heads, seqlen_k, head_dim_v)
  DqAccum dq_accum;
};

// A row of queries among all (batch, head, query).
struct QueryRow {
  int64_t batch, head, row;

  __device__ QueryRow(const BwdParams& params, int64_t index)
      : batch(index / params.seqlen_q / params.num_heads),
        head(index / params.seqlen_q % params.num_heads),
        row(index % params.seqlen_q) {}

  // Where it begins.
  template <class Element>
  __device__ const Element* in(const void* tensor, const Strides& strides) const {
    return static_cast<const Element*>(tensor) + batch * strides.batch + row * strides.row + head * strides.head;
  }
};

}  // namespace mixed_attention::cuda::portable
