// The Hopper kernels' entry points, and what they serve.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/launch.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// Why a pass cannot serve a problem; empty where it can.
std::string refusal_fwd(const Problem& problem);
std::string refusal_bwd(const Problem& problem);

// Whether it can serve this call of such a problem: its tensors' alignment, its plan's size.
bool can_fwd(const FwdParams& params);
bool can_bwd(const BwdParams& params);

Layout layout_fwd(const FwdParams& params);
Layout layout_bwd(const BwdParams& params);

size_t fwd_workspace_size(const FwdParams& params);
size_t bwd_workspace_size(const BwdParams& params);

// Whether gradients may be written where the inputs lie, each in the place of its own.
bool can_overwrite_inputs(const BwdParams& params);

// These enqueue on params.stream and return.
void run_fwd(const FwdParams& params);
void run_bwd(const BwdParams& params);

}  // namespace mixed_attention::cuda::hopper
