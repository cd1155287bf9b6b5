// What the launchers of all passes share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <numbers>

#include "ceil_div.h"
#include "cuda/common/allow_shared_memory.cuh"
#include "cuda/common/check.h"
#include "cuda/portable/config.h"
#include "cuda/portable/kernels.h"

namespace mixed_attention::cuda::portable {

// A (batch, seqlen, heads, cols) tensor; null and of strides of 0 if it is not there.
struct TensorRows {
  const void* data;
  Strides strides;
};

// Whether every row of tensors of such elements starts at a multiple of 16 bytes.
template <class Element>
bool are_aligned(std::initializer_list<TensorRows> tensors) {
  constexpr int64_t kStep = 16 / sizeof(Element);
  return std::all_of(tensors.begin(), tensors.end(), [](const TensorRows& tensor) {
    const Strides& strides = tensor.strides;
    return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && strides.batch % kStep == 0 &&
           strides.row % kStep == 0 && strides.head % kStep == 0;
  });
}

// What a forward multiplies scores by: not 0, by which the -inf of blocked keys would become NaN, but next to it even
// times the largest score.
inline float scale_log2_of_forward(const AttentionParams& params) {
  return std::max(static_cast<float>(params.softmax_scale * std::numbers::log2e),
                  std::numeric_limits<float>::denorm_min());
}

inline unsigned blocks_for(int64_t threads, int block_size) {
  return static_cast<unsigned>(ceil_div(threads, block_size));
}

// Launches a kernel over tiles, a block for each item of its work.
template <auto kKernel, class Shared, class Arguments>
void launch_tiles(const char* name, const AttentionParams& params, const Arguments& args, const GridWork& work) {
  static_assert(sizeof(Shared) <= kMaxSharedBytes, "a block takes more shared memory than the smaller chips give");
  allow_shared_memory<kKernel>(sizeof(Shared), params.device, name);
  kKernel<<<work.grid, Shared::kTile.num_threads(), sizeof(Shared), static_cast<cudaStream_t>(params.stream)>>>(
      args, work.in_parameters);
  check(cudaGetLastError(), name);
}

}  // namespace mixed_attention::cuda::portable
