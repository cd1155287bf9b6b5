// The Hopper kernels' entry points, and what they serve.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/launch.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// Why the forward cannot serve a problem; empty where it can.
std::string refusal_fwd(const Problem& problem);

// Whether it can serve this call of such a problem: its tensors' alignment, its plan's size.
bool can_fwd(const FwdParams& params);

size_t fwd_workspace_size(const FwdParams& params);

// Enqueues on params.stream and returns.
void run_fwd(const FwdParams& params);

}  // namespace mixed_attention::cuda::hopper
