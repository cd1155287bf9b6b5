// fp32 tensors in 16 bits: all those of a step by one launch, because small ones take less time than a launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "ceil_div.h"
#include "cuda/common/check.h"
#include "cuda/launch.h"
#include "cuda/ptx/convert.cuh"

namespace mixed_attention::cuda {
namespace {

constexpr int kThreads = 256, kVector = 4;
// Blocks of a tensor walk it together. So many fill any device, and those of a small tensor end at once.
constexpr int64_t kMostBlocks = 2048;

// A row of blocks for each tensor.
template <class Element>
__global__ void cast_kernel(const __grid_constant__ CastParams params) {
  const CastParams::Part& tensor = params.tensors[blockIdx.y];
  const auto* from = static_cast<const float*>(tensor.from);
  auto* to = static_cast<Element*>(tensor.to);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const bool is_aligned =
      reinterpret_cast<uintptr_t>(from) % sizeof(float4) == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(uint2) == 0;
  const int64_t num_vectors = is_aligned ? tensor.count / kVector : 0;
  for (int64_t i = first; i < num_vectors; i += step) {
    const float4 x = reinterpret_cast<const float4*>(from)[i];
    reinterpret_cast<uint2*>(to)[i] = {ptx::pack<Element>(x.x, x.y), ptx::pack<Element>(x.z, x.w)};
  }
  for (int64_t i = num_vectors * kVector + first; i < tensor.count; i += step) to[i] = static_cast<Element>(from[i]);
}

}  // namespace

void run_cast(const CastParams& params) {
  int64_t most = 0;
  for (int i = 0; i < params.num_tensors; ++i) most = std::max(most, params.tensors[i].count);
  if (most == 0) return;
  constexpr int64_t kOfBlock = kThreads * kVector;
  const dim3 grid(static_cast<unsigned>(std::min(ceil_div(most, kOfBlock), kMostBlocks)), params.num_tensors);
  const auto stream = static_cast<cudaStream_t>(params.stream);
  if (params.dtype == DType::kFloat16) {
    cast_kernel<__half><<<grid, kThreads, 0, stream>>>(params);
  } else {
    cast_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(params);
  }
  check(cudaGetLastError(), "cast_kernel");
}

}  // namespace mixed_attention::cuda
