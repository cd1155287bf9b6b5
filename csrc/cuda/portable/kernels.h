// What the objects of kernels offer to the host: launches of one arithmetic and padded head_dim.
//
// This and what it includes is read once for every object, by the slowest of compilers: no <string>, <memory> or
// <functional> here.
#pragma once

#include <cstdint>

#include "cuda/common/row_lse.h"
#include "cuda/common/row_reference.h"
#include "cuda/portable/arithmetic.h"
#include "cuda/portable/work_table.h"
#include "params.h"

namespace mixed_attention::cuda::portable {

// The work of a grid as its kernel gets it: the table lies in the kernel's parameters, or on the device.
struct GridWork {
  DeviceWork table;
  InlineWork in_parameters;
  unsigned grid;  // blocks
};

// Where a forward's workspace holds what.
struct FwdBuffers {
  float* partial_out;  // (num_splits, batch_size, num_heads, seqlen_q, head_dim_v); null without splits
  RowLse* row_lses;    // (num_splits, batch_size, num_heads, seqlen_q)
};

// And a backward's.
struct BwdBuffers {
  float* lse_log2;                 // (batch_size, num_heads, seqlen_q); +inf for rows without keys
  float* delta;                    // likewise
  RowReference* references;        // likewise
  int* has_references;             // one word, 0 where no row has one; zeros from here on to the end of dq_accum
  float* dq_accum;                 // DqAccum; null where a kernel over queries computes dq
  int dq_accum_cols;               // head_dim of the problem, rounded up to a multiple of 8
  int64_t dq_accum_size;           // in numbers
  float* partial_dq;               // (num_splits, batch_size, num_heads, seqlen_q, head_dim); null without splits
  float *partial_dk, *partial_dv;  // (num_splits, batch_size, num_heads, seqlen_k, head_dim or head_dim_v)
};

// Instantiated by cuda/instantiate_portable_{fwd,bwd}.cu. They enqueue on params.stream.
template <Arithmetic kArithmetic, int kHeadDim>
void launch_fwd(const FwdParams& params, const FwdBuffers& buffers, const GridWork& by_query);

// All gradients where buffers.dq_accum is there, which takes what other blocks add to dq; else dk and dv.
template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd_by_key(const BwdParams& params, const BwdBuffers& buffers, const GridWork& by_key);

// dq, of what the launch by key has prepared.
template <Arithmetic kArithmetic, int kHeadDim>
void launch_bwd_by_query(const BwdParams& params, const BwdBuffers& buffers, const GridWork& by_query);

}  // namespace mixed_attention::cuda::portable
