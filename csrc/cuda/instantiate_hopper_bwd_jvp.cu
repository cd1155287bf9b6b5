// The Hopper kernels for gradients of tangents, of some DTYPES, as the compiler is told: instantiations.txt.
#include "cuda/hopper/bwd_jvp/launch.cuh"
#include "cuda/hopper/kernel_dtypes.h"

namespace mixed_attention::cuda::hopper {

static_assert(HEAD_DIM == kJvpHeadDim, "there are kernels of one width");

#define INSTANTIATE(DTYPE)                                                                         \
  template void launch_bwd_jvp<DTYPE::Element>(const BwdJvpParams& params, const BwdJvpRows& rows, \
                                               const BwdJvpPlan& plan, void* sums);
DTYPES

}  // namespace mixed_attention::cuda::hopper
