// What the instantiations of the backward launcher have in common with its dispatch.
#pragma once

#include "cuda/hopper/key_work_table.h"
#include "cuda/hopper/tensor_map.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// The inputs as the copy engine reads them.
struct BwdTensors {
  TensorView q, k, v, dout;
};

BwdTensors bwd_tensors(const BwdParams& params);

// The parts of params.workspace.
struct BwdWorkspace {
  float* lse_log2;  // QueryStats
  float* delta;
  float* delta_of_rows;  // (batch_size, num_heads, seqlen_q), for the kernel that owns dq; else null
  float* dq_sums;        // (batch_size, num_heads, num_tiles, kQueryTileRows * head_dim), for sums of dq; else null
};

// Whether one kernel computes all gradients, with sums of dq in the order in which they come. To measure the other
// form, this is the place to change.
bool adds_dq(const BwdParams& params);

// Over how many blocks the queries of a key tile are split: 2 where two halves end earlier than a whole, else 1. Sums
// of wide heads have no room in shared memory to be exchanged.
int num_query_splits(const BwdParams& params, const std::vector<QueryRun>& runs);

BwdWorkspace bwd_workspace(const BwdParams& params);

// Instantiated in cuda/instantiations, one file per element type and head_dim.
template <typename Element, int kHeadDim>
void launch_bwd(const BwdParams& params);

}  // namespace mixed_attention::cuda::hopper
