// The portable kernels of tangents, and of gradients of them, of some DTYPES and one HEAD_DIM, as the compiler is told:
// instantiations.txt.
#include "cuda/portable/bwd_jvp_launch.cuh"
#include "cuda/portable/jvp_launch.cuh"

namespace mixed_attention::cuda::portable {

#define INSTANTIATE(DTYPE)                                                                                      \
  template void launch_jvp<arithmetic::DTYPE, HEAD_DIM>(const JvpParams&, const GridWork&);                     \
  template void launch_bwd_jvp_rows<arithmetic::DTYPE, HEAD_DIM>(const BwdJvpParams&, const BwdJvpBuffers&,     \
                                                                 const GridWork&);                              \
  template void launch_bwd_jvp_by_key<arithmetic::DTYPE, HEAD_DIM>(const BwdJvpParams&, const BwdJvpBuffers&,   \
                                                                   const GridWork&);                            \
  template void launch_bwd_jvp_by_query<arithmetic::DTYPE, HEAD_DIM>(const BwdJvpParams&, const BwdJvpBuffers&, \
                                                                     const GridWork&);
DTYPES

}  // namespace mixed_attention::cuda::portable
