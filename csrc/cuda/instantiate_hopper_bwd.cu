// The Hopper backward kernels of some DTYPES and one HEAD_DIM, as the compiler is told: instantiations.txt.
#include "cuda/hopper/bwd/launch.cuh"

namespace mixed_attention::cuda::hopper {
namespace {

using bf16 = __nv_bfloat16;
using fp16 = __half;

}  // namespace

#define INSTANTIATE(DTYPE)                                                                              \
  template void launch_bwd<DTYPE, HEAD_DIM>(const BwdParams& params, const std::vector<QueryRun>& runs, \
                                            const BwdPlan& plan, const char* list);
DTYPES

}  // namespace mixed_attention::cuda::hopper
