// The portable backward kernels of some DTYPES and one HEAD_DIM, as the compiler is told: instantiations.txt.
#include "cuda/portable/bwd_launch.cuh"

namespace mixed_attention::cuda::portable {
namespace arithmetic {

constexpr Arithmetic bf16 = Arithmetic::kBFloat16, fp16 = Arithmetic::kFloat16, fp32 = Arithmetic::kTf32x3,
                     tf32 = Arithmetic::kTf32;

}  // namespace arithmetic

#define INSTANTIATE(DTYPE)                                                                                            \
  template void launch_bwd_by_key<arithmetic::DTYPE, HEAD_DIM>(const BwdParams&, const BwdBuffers&, const GridWork&); \
  template void launch_bwd_by_query<arithmetic::DTYPE, HEAD_DIM>(const BwdParams&, const BwdBuffers&, const GridWork&);
DTYPES

}  // namespace mixed_attention::cuda::portable
