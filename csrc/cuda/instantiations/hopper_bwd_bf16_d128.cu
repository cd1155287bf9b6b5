#include "cuda/hopper/bwd/launch.cuh"

namespace mixed_attention::cuda::hopper {

template void launch_bwd<__nv_bfloat16, 128>(const BwdParams& params);

}  // namespace mixed_attention::cuda::hopper
