#include "cuda/hopper/bwd/launch.cuh"

namespace mixed_attention::cuda::hopper {

template void launch_bwd<__half, 64>(const BwdParams& params);

}  // namespace mixed_attention::cuda::hopper
