// What the host decides about a launch of the kernels of tangents before it.
#pragma once

#include "cuda/portable/plan.h"
#include "cuda/portable/tangent_config.h"
#include "cuda/portable/tangent_kernels.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda::portable {

struct JvpPlan {
  Arithmetic arithmetic;
  int head_dim;  // padded
  Tile tile;
  PassOfCall by_query;
  size_t workspace_size;
};

struct BwdJvpPlan {
  Arithmetic arithmetic;
  int head_dim;
  PassOfCall by_query, by_key;
  BwdJvpBuffers buffers;
  size_t workspace_size;
};

// These are what plan.h has for the passes of the first order.
JvpPlan plan_jvp(const JvpParams& params);
BwdJvpPlan plan_bwd_jvp(const BwdJvpParams& params);
void take_workspace(const JvpParams& params, JvpPlan& plan);
void take_workspace(const BwdJvpParams& params, BwdJvpPlan& plan);

}  // namespace mixed_attention::cuda::portable
