// The portable forward kernels of some DTYPES and one HEAD_DIM, as the compiler is told: instantiations.txt.
#include "cuda/portable/fwd_launch.cuh"

namespace mixed_attention::cuda::portable {
namespace arithmetic {

constexpr Arithmetic bf16 = Arithmetic::kBFloat16, fp16 = Arithmetic::kFloat16, fp32 = Arithmetic::kTf32x3,
                     tf32 = Arithmetic::kTf32;

}  // namespace arithmetic

#define INSTANTIATE(DTYPE) \
  template void launch_fwd<arithmetic::DTYPE, HEAD_DIM>(const FwdParams&, const FwdBuffers&, const GridWork&);
DTYPES

}  // namespace mixed_attention::cuda::portable
