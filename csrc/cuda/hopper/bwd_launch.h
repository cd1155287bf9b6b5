// What the instantiations of the backward launcher have in common with its dispatch.
#pragma once

#include <vector>

#include "cuda/hopper/bwd_params.h"
#include "cuda/hopper/dq_sums.h"
#include "cuda/hopper/key_work_table.h"
#include "cuda/hopper/mask.h"
#include "cuda/hopper/tensor_map.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// The inputs as the copy engine reads them.
struct BwdTensors {
  TensorView q, k, v, dout;
};

// Gradients of queries, (batch_size, seqlen_q, num_heads, head_dim).
struct DqTensor {
  void* data;
  Strides strides;
};

// Some of the heads of a call that has one sequence, or some of the sequences of a batch. Shares come one after the
// other and add up their dq in the same memory.
struct BwdShare {
  int64_t first, count;
};

// The parts of params.workspace, and of params.spare_out.
struct BwdWorkspace {
  float* lse_log2;  // QueryStats
  float* delta;
  float* delta_of_rows;  // (batch_size, num_heads, seqlen_q), for the kernel that owns dq; else null
  DqSums dq_sums;
  std::vector<BwdShare> shares;  // that dq_sums serve
  DqTensor dq;  // as the kernel that owns it writes it: the result, or apart from the queries where these lie there
  MaskedKeys masked_keys;  // none without a mask
  size_t size;
};

// Whether one kernel computes all gradients, and adds up dq as its parts come, or in deterministic mode in turn. To
// measure the other form, this is the place to change.
bool adds_dq(const BwdParams& params);

// What the kernels behind the statistics need to know of a share.
BwdParams params_of(const BwdShare& share, const BwdParams& params);
QueryStats stats_of(const BwdShare& share, const BwdParams& params, const QueryStats& stats);

// Over how many blocks the queries of a key tile are split: 2 where two halves end earlier than a whole, else 1. Wide
// heads have no room in shared memory to exchange their sums, and the kernels for padding masks do not split.
int num_query_splits(const BwdParams& params, const std::vector<QueryRun>& runs);

// Of the pointers it reads params.workspace, null to learn the size, and asks whether there is a mask, whether the
// gradients take the place of the inputs, and whether there is spare memory.
BwdWorkspace bwd_workspace(const BwdParams& params);

// Enqueues the way of dq to where the queries were, if it was written apart from them.
void move_dq(const BwdParams& params, const BwdWorkspace& workspace);

// What is read: as it is given, and, where there is a mask, with the copies of keys and values in the workspace.
BwdTensors bwd_tensors(const BwdParams& params);
BwdTensors bwd_tensors(const BwdParams& params, const BwdWorkspace& workspace);

// Instantiated in cuda/instantiations, one file per element type and head_dim.
template <typename Element, int kHeadDim>
void launch_bwd(const BwdParams& params);

}  // namespace mixed_attention::cuda::hopper
