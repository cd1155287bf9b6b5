// The large kernels of the backward of tangents, behind small ones that make the numbers of each query.
#pragma once

#include <cstddef>
#include <functional>

#include "cuda/common/bwd_jvp_rows.h"
#include "derivatives_params.h"

namespace mixed_attention::cuda {

struct BwdJvpProducts {
  size_t workspace_size = 0;  // bytes that they need beside what the small ones do
  std::function<void(const BwdJvpParams&, const BwdJvpRows&, void* workspace)> run;
};

}  // namespace mixed_attention::cuda
