// The Hopper kernels for tangents of the forward, of some DTYPES, as the compiler is told: instantiations.txt.
#include "cuda/hopper/jvp/launch.cuh"
#include "cuda/hopper/kernel_dtypes.h"

namespace mixed_attention::cuda::hopper {

static_assert(HEAD_DIM == kJvpHeadDim, "there are kernels of one width");

#define INSTANTIATE(DTYPE) template void launch_jvp<DTYPE::Element>(const JvpParams& params, const WorkTable& table);
DTYPES

}  // namespace mixed_attention::cuda::hopper
