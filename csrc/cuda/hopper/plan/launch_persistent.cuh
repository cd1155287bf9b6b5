// How the persistent kernels are launched.
#pragma once

#include "cuda/common/allow_shared_memory.cuh"
#include "cuda/hopper/plan/persistent_blocks.h"
#include "cuda/hopper/tile/launch_kernel.cuh"
#include "params.h"

namespace mixed_attention::cuda::hopper {

struct PersistentShape {
  int num_items;
  int threads;
  Start start = Start::kOverlapping;
  int cluster = 1;  // blocks in a row that share an item
  int blocks = 1;   // on a multiprocessor at a time
};

template <auto kKernel, int kSharedBytes, typename KernelParams>
void launch_persistent(const char* name, const PersistentShape& shape, const AttentionParams& params,
                       const KernelParams& kernel_params) {
  if (shape.num_items == 0) return;
  allow_shared_memory<kKernel>(kSharedBytes, params.device, name);
  const int num_blocks = num_persistent_blocks(shape.num_items, params.device, shape.cluster, shape.blocks);
  launch_kernel<kKernel, kSharedBytes>(name, {num_blocks, shape.threads, shape.start, shape.cluster}, params.stream,
                                       kernel_params);
}

}  // namespace mixed_attention::cuda::hopper
