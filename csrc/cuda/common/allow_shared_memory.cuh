// Leave for a kernel to use more shared memory than it may by default, 48 KiB a block.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/check.h"
#include "cuda/common/devices.h"

namespace mixed_attention::cuda {

// Gives leave on a device, the current one: every device has to be asked. Once for each, because it takes some
// microseconds of the host. Two threads that come at once both ask.
template <auto kKernel>
void allow_shared_memory(int bytes, int device, const char* name) {
  static Devices allowed;
  if (allowed.contains(device)) return;
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  allowed.add(device);
}

}  // namespace mixed_attention::cuda
