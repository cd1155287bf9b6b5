#include "cuda/hopper/bwd/launch.cuh"

namespace mixed_attention::cuda::hopper {

template void launch_bwd<__nv_bfloat16, 192>(const BwdParams& params);

}  // namespace mixed_attention::cuda::hopper
