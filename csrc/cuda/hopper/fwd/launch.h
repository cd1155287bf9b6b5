// The forward launcher, as its instantiations and its dispatch see it.
#pragma once

#include "cuda/common/row_lse.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/mask/mask.h"
#include "cuda/hopper/plan/query_table.h"
#include "cuda/hopper/plan/tensor_map.h"
#include "cuda/hopper/split_fp16/half_limbs.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// The inputs as TMA reads them.
struct FwdTensors {
  TensorView q, k, v;
};

FwdTensors fwd_tensors(const FwdParams& params);

// The host's decisions about a launch.
struct FwdPlan {
  FwdForm form;
  WorkTable table;            // of a list without its places in memory
  int64_t list_bytes = 0;     // of a list
  char* list_room = nullptr;  // where it lies for want of a kept one: device_tables.h
  // Results of splits: (splits, kBlockM, head_dim_v), normalised, and (splits, kBlockM); null where there are none.
  float* partial_out = nullptr;
  RowLse* row_lses = nullptr;
  MaskedKeys masked_keys{};                   // none without a mask
  HalfLimbs q_limbs{}, k_limbs{}, v_limbs{};  // of fp32 inputs, none of others
  size_t workspace_size = 0;
};

// params.workspace is null for a plan of the same sizes. Other pointers count only by whether there is a mask.
FwdPlan plan_fwd(const FwdParams& params);

// Says where in params.workspace all of a plan lies, once that is there.
void take_workspace(const FwdParams& params, FwdPlan& plan);

// Instantiated by cuda/instantiate_hopper_fwd.cu, one object per element type, head_dim and number of limbs.
template <typename Element, int kHeadDim, int kLimbs = 1>
void launch_fwd(const FwdParams& params, const FwdPlan& plan);

}  // namespace mixed_attention::cuda::hopper
