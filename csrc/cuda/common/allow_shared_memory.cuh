// Leave for a kernel to use more shared memory than it may by default, 48 KiB a block.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "cuda/common/check.h"

namespace mixed_attention::cuda {

// Gives leave on a device, the current one: every device has to be asked. Once for each, because it takes some
// microseconds of the host; each time on those beyond the sixty-fourth. Two threads that come at once both ask.
template <auto kKernel>
void allow_shared_memory(int bytes, int device, const char* name) {
  static std::atomic<uint64_t> allowed;  // by device
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return;
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  allowed.fetch_or(bit, std::memory_order_relaxed);
}

}  // namespace mixed_attention::cuda
