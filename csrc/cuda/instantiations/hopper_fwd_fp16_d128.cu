#include "cuda/hopper/fwd/launch.cuh"

namespace mixed_attention::cuda::hopper {

template void launch_fwd<__half, 128>(const FwdParams& params, const FwdPlan& plan);

}  // namespace mixed_attention::cuda::hopper
