// The Hopper forward kernels of some DTYPES and one HEAD_DIM, as the compiler is told: instantiations.txt.
#include "cuda/hopper/fwd/launch.cuh"
#include "cuda/hopper/kernel_dtypes.h"

namespace mixed_attention::cuda::hopper {

#define INSTANTIATE(DTYPE) \
  template void launch_fwd<DTYPE::Element, HEAD_DIM, DTYPE::kLimbs>(const FwdParams& params, const FwdPlan& plan);
DTYPES

}  // namespace mixed_attention::cuda::hopper
