// The portable kernels' entry points: sm_80 and later.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/common/bwd_jvp_products.h"
#include "cuda/launch.h"
#include "derivatives_params.h"
#include "params.h"

// The padded head_dims for which kernels are built. A development build may narrow the list.
#ifndef MIXED_ATTENTION_HEAD_DIMS
#define MIXED_ATTENTION_HEAD_DIMS 32, 64, 96, 128, 192, 256
#endif

namespace mixed_attention::cuda::portable {

constexpr int kHeadDims[] = {MIXED_ATTENTION_HEAD_DIMS};

// Why these kernels do not serve a problem; empty where they do.
std::string refusal(const Problem& problem);

// How a call that these can serve is served.
Launch<FwdParams> launch_of_fwd(const FwdParams& params);
Launch<BwdParams> launch_of_bwd(const BwdParams& params);

// The same of tangents.
std::string refusal_of_tangents(const Problem& problem);
Launch<JvpParams> launch_of_jvp(const JvpParams& params);
// Whether that launch, which can write out and lse, does so as fast as a forward: its walks over keys are never split.
bool jvp_serves_forward(const JvpParams& params);
Launch<BwdJvpParams> launch_of_bwd_jvp(const BwdJvpParams& params);
// The same with other large kernels, behind the small ones that make the numbers of rows.
Launch<BwdJvpParams> launch_of_bwd_jvp(const BwdJvpParams& params, BwdJvpProducts products);

}  // namespace mixed_attention::cuda::portable
