#include "cuda/portable/fwd_launch.cuh"

namespace mixed_attention::cuda::portable {
template void launch_fwd<Arithmetic::kFloat16, 192>(const FwdParams& params, const FwdPlan& plan);
}
