#include "cuda/portable/fwd_launch.cuh"

namespace mixed_attention::cuda::portable {
template void launch_fwd<Arithmetic::kTf32x3, 256>(const FwdParams& params, const FwdPlan& plan);
}
