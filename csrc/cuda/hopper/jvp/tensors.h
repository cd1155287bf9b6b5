// The inputs of the forward's tangents as TMA reads them.
#pragma once

#include "cuda/hopper/plan/tensor_map.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda::hopper {

// A tensor and its tangent in one direction, without data where it does not move.
struct MovingView {
  TensorView still, dot;
};

struct JvpTensors {
  MovingView q, k, v;
};

JvpTensors jvp_tensors(const JvpParams& params, int direction);

}  // namespace mixed_attention::cuda::hopper
