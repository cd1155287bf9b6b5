// The Hopper backward kernels of some DTYPES and one HEAD_DIM, as the compiler is told: instantiations.txt.
#include "cuda/hopper/bwd_fp32/launch.cuh"
#include "cuda/hopper/kernel_dtypes.h"

namespace mixed_attention::cuda::hopper {

#define INSTANTIATE(DTYPE)                                           \
  template void launch_bwd<DTYPE::Element, HEAD_DIM, DTYPE::kLimbs>( \
      const BwdParams& params, const std::vector<QueryRun>& runs, const BwdPlan& plan, const char* list);
DTYPES

}  // namespace mixed_attention::cuda::hopper
