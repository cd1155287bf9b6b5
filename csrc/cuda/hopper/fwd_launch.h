// What the instantiations of the forward launcher have in common with its dispatch.
#pragma once

#include "cuda/hopper/tensor_map.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// The inputs as the copy engine reads them.
struct FwdTensors {
  TensorView q, k, v;
};

FwdTensors fwd_tensors(const FwdParams& params);

// Instantiated in cuda/instantiations, one file per element type and head_dim.
template <typename Element, int kHeadDim>
void launch_fwd(const FwdParams& params);

}  // namespace mixed_attention::cuda::hopper
