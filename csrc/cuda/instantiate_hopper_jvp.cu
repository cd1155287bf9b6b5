// The Hopper kernels for tangents of the forward, of some DTYPES, as the compiler is told: instantiations.txt.
#include "cuda/hopper/jvp/launch.cuh"

namespace mixed_attention::cuda::hopper {
namespace {

using bf16 = __nv_bfloat16;
using fp16 = __half;

static_assert(HEAD_DIM == kJvpHeadDim, "there are kernels of one width");

}  // namespace

#define INSTANTIATE(DTYPE) template void launch_jvp<DTYPE>(const JvpParams& params, const WorkTable& table);
DTYPES

}  // namespace mixed_attention::cuda::hopper
