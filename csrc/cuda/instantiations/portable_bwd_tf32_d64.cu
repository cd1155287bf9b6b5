#include "cuda/portable/bwd_launch.cuh"

namespace mixed_attention::cuda::portable {
template void launch_bwd<Arithmetic::kTf32, 64>(const BwdParams& params, const BwdPlan& plan);
}
