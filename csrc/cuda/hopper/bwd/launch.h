// The backward launcher, as its instantiations and its dispatch see it.
#pragma once

#include <vector>

#include "cuda/common/row_reference.h"
#include "cuda/common/scratch.h"
#include "cuda/hopper/bwd/dq_accum.h"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/plan.h"
#include "cuda/hopper/mask/mask.h"
#include "cuda/hopper/plan/tensor_map.h"
#include "cuda/hopper/split_fp16/half_limbs.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

struct BwdTensors {
  TensorView q, k, v, dout;
};

// The limbs of fp32 inputs.
struct BwdLimbs {
  HalfLimbs q, k, v, dout;
};

// Gradients of queries, (batch_size, seqlen_q, num_heads, head_dim).
struct DqTensor {
  void* data;
  Strides strides;
};

// What lies where in params.workspace, and in params.spare_out.
struct BwdWorkspace {
  BwdPlan plan;
  QueryStats stats;           // of 16-bit inputs
  Fp32QueryStats fp32_stats;  // of fp32 ones, as are limbs
  BwdLimbs limbs;
  float* delta_of_rows;      // (batch_size, num_heads, seqlen_q), for the kernel that owns dq; else null
  RowReference* references;  // ScoreSource
  DqAccum dq_accum;          // of a share; turns of all
  DqTensor dq;  // as the kernel that owns it writes it: the result, or apart from the queries where these lie there
  MaskedKeys masked_keys;  // none without a mask
  char* list_room;         // where a list lies for want of a kept one: device_tables.h
  uint32_t* next_item;     // KeyList
  float* own_sums;         // ListedDkDvKernelParams
  size_t size;
};

// Lays out params.workspace; if that is null, only `size` counts. Other pointers are only compared: the mask and
// spare_out with null, gradients with inputs. runs: make_query_runs.
BwdWorkspace bwd_workspace(const BwdParams& params, const std::vector<QueryRun>& runs, BwdPlan plan);

// Enqueues the way of dq to where the queries were, if it was written apart from them.
void move_dq(const BwdParams& params, const BwdWorkspace& workspace);

// The inputs as they are given.
BwdTensors bwd_tensors(const BwdParams& params);

// Instantiated by cuda/instantiate_hopper_bwd.cu, one object per element type, head_dim and number of limbs. list:
// where the device has the plan's.
template <typename Element, int kHeadDim, int kLimbs>
void launch_bwd(const BwdParams& params, const std::vector<QueryRun>& runs, const BwdPlan& plan, const char* list);

}  // namespace mixed_attention::cuda::hopper
