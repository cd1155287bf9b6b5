// What the launchers of both passes share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ceil_div.h"
#include "cuda/common/allow_shared_memory.cuh"
#include "cuda/common/check.h"
#include "cuda/portable/config.h"
#include "cuda/portable/kernels.h"

namespace mixed_attention::cuda::portable {

// Whether every row of a (batch, seqlen, heads, cols) tensor starts at a multiple of 16 bytes.
inline bool is_aligned(const void* data, const Strides& strides, int element_size) {
  const int64_t step = 16 / element_size;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch % step == 0 && strides.row % step == 0 &&
         strides.head % step == 0;
}

inline unsigned blocks_for(int64_t threads, int block_size) {
  return static_cast<unsigned>(ceil_div(threads, block_size));
}

}  // namespace mixed_attention::cuda::portable
