// The inputs of gradients of tangents as TMA reads them.
#pragma once

#include "cuda/hopper/plan/tensor_map.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda::hopper {

// Those of queries, q, q', y and y2, and those of keys, k, k', v and v'; without data where one is not there.
struct BwdJvpTensors {
  TensorView queries[4], keys[4];
};

BwdJvpTensors bwd_jvp_tensors(const BwdJvpParams& params);

}  // namespace mixed_attention::cuda::hopper
