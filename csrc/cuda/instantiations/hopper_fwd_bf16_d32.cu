#include "cuda/hopper/fwd/launch.cuh"

namespace mixed_attention::cuda::hopper {

template void launch_fwd<__nv_bfloat16, 32>(const FwdParams& params, const FwdPlan& plan);

}  // namespace mixed_attention::cuda::hopper
