// The launcher of the forward's tangents, as its instantiations and its dispatch see it.
#pragma once

#include "cuda/hopper/plan/query_table.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda::hopper {

// Instantiated by cuda/instantiate_hopper_jvp.cu, for calls that move keys or values and for those of queries alone. It
// enqueues a launch for every direction.
template <typename Element, bool kMovesKeys>
void launch_jvp(const JvpParams& params, const WorkTable& table);

}  // namespace mixed_attention::cuda::hopper
