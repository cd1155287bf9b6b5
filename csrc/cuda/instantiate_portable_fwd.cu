// The portable forward kernels of some DTYPES and one HEAD_DIM, as the compiler is told: instantiations.txt.
#include "cuda/portable/fwd_launch.cuh"

namespace mixed_attention::cuda::portable {

#define INSTANTIATE(DTYPE) \
  template void launch_fwd<arithmetic::DTYPE, HEAD_DIM>(const FwdParams&, const FwdBuffers&, const GridWork&);
DTYPES

}  // namespace mixed_attention::cuda::portable
