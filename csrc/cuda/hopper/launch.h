// The Hopper kernels' entry points, and what they serve.
#pragma once

#include <string>

#include "cuda/common/bwd_jvp_products.h"
#include "cuda/launch.h"
#include "derivatives_params.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// Why a pass cannot serve a problem; empty where it can.
std::string refusal_fwd(const Problem& problem);
std::string refusal_bwd(const Problem& problem);
std::string refusal_jvp(const Problem& problem);

// Why it cannot serve this call of such a problem: its tensors' alignment, its plan's size; null where it can.
const char* refusal_of_fwd(const FwdParams& params);
const char* refusal_of_bwd(const BwdParams& params);
const char* refusal_of_jvp(const JvpParams& params);

// How a call that these can serve is served.
Launch<FwdParams> launch_of_fwd(const FwdParams& params);
Launch<BwdParams> launch_of_bwd(const BwdParams& params);
Launch<JvpParams> launch_of_jvp(const JvpParams& params);

// Gradients of tangents have the problems of tangents. What is here is their large kernels, behind small ones that make
// the numbers of rows.
const char* refusal_of_bwd_jvp(const BwdJvpParams& params);
Layout layout_of_bwd_jvp(const BwdJvpParams& params);
BwdJvpProducts products_of_bwd_jvp(const BwdJvpParams& params);

}  // namespace mixed_attention::cuda::hopper
