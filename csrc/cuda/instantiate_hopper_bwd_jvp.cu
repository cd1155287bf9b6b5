// The Hopper kernels for gradients of tangents, of some DTYPES, as the compiler is told: instantiations.txt.
#include "cuda/hopper/bwd_jvp/launch.cuh"

namespace mixed_attention::cuda::hopper {
namespace {

using bf16 = __nv_bfloat16;
using fp16 = __half;

static_assert(HEAD_DIM == kJvpHeadDim, "there are kernels of one width");

}  // namespace

#define INSTANTIATE(DTYPE)                                                                                           \
  template void launch_bwd_jvp<DTYPE>(const BwdJvpParams& params, const BwdJvpRows& rows, const WorkTable& by_query, \
                                      const WorkTable& by_key);
DTYPES

}  // namespace mixed_attention::cuda::hopper
