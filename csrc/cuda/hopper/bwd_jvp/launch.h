// The launcher of the kernels for gradients of tangents, as its instantiations and its dispatch see it.
#pragma once

#include "cuda/common/bwd_jvp_rows.h"
#include "cuda/hopper/plan/query_table.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda::hopper {

// Instantiated by cuda/instantiate_hopper_bwd_jvp.cu. by_key: a table whose segments are of keys, and whose ranges are
// of queries that read them.
template <typename Element>
void launch_bwd_jvp(const BwdJvpParams& params, const BwdJvpRows& rows, const WorkTable& by_query,
                    const WorkTable& by_key);

}  // namespace mixed_attention::cuda::hopper
