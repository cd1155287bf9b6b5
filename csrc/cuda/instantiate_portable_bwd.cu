// The portable backward kernels of some DTYPES and one HEAD_DIM, as the compiler is told: instantiations.txt.
#include "cuda/portable/bwd_launch.cuh"

namespace mixed_attention::cuda::portable {

#define INSTANTIATE(DTYPE)                                                                                            \
  template void launch_bwd_by_key<arithmetic::DTYPE, HEAD_DIM>(const BwdParams&, const BwdBuffers&, const GridWork&); \
  template void launch_bwd_by_query<arithmetic::DTYPE, HEAD_DIM>(const BwdParams&, const BwdBuffers&, const GridWork&);
DTYPES

}  // namespace mixed_attention::cuda::portable
