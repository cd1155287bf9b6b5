// The Hopper forward kernels of some DTYPES and one HEAD_DIM, as the compiler is told: instantiations.txt.
#include "cuda/hopper/fwd/launch.cuh"

namespace mixed_attention::cuda::hopper {
namespace {

template <typename Element_, int kLimbs_>
struct Numbers {
  using Element = Element_;
  static constexpr int kLimbs = kLimbs_;
};

using bf16 = Numbers<__nv_bfloat16, 1>;
using fp16 = Numbers<__half, 1>;
using fp32 = Numbers<float, 2>;
using tf32 = Numbers<float, 1>;

}  // namespace

#define INSTANTIATE(DTYPE) \
  template void launch_fwd<DTYPE::Element, HEAD_DIM, DTYPE::kLimbs>(const FwdParams& params, const FwdPlan& plan);
DTYPES

}  // namespace mixed_attention::cuda::hopper
