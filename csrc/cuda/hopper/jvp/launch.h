// The launcher of the forward's tangents, as its instantiations and its dispatch see it.
#pragma once

#include "cuda/hopper/plan/query_table.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda::hopper {

// Instantiated by cuda/instantiate_hopper_jvp.cu. It enqueues a launch for every direction, or one for three. table: of
// the tiles of the call's form (config.h).
template <typename Element>
void launch_jvp(const JvpParams& params, const WorkTable& table);

}  // namespace mixed_attention::cuda::hopper
