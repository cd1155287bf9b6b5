// How the Hopper kernels are launched.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/check.h"

namespace mixed_attention::cuda::hopper {

// The time at which the blocks of a grid come.
enum class Start {
  // They come as soon as there is room beside the last ones of the grid before. They prepare what needs no global
  // memory, barriers and tensor maps, and wait (cuda/ptx/dependent_grids.cuh): that hides the latency of a launch,
  // microseconds that count where a kernel takes some tens of them.
  kOverlapping,
  // They come when the grid before has ended, so that neighbours, which read the same, run side by side.
  kInOrder,
  // They come then, and all at once, as they wait for one another.
  kTogether,
};

struct LaunchShape {
  dim3 grid;
  int threads;
  Start start = Start::kOverlapping;
  int cluster = 1;  // blocks of one
};

// kSharedBytes: of dynamic shared memory; more than a kernel may have by default needs allow_shared_memory first.
template <auto kKernel, int kSharedBytes = 0, typename... Params>
void launch_kernel(const char* name, const LaunchShape& shape, void* stream, const Params&... params) {
  static_assert(kSharedBytes <= 227 * 1024, "a block of an H100 has 227 KiB of shared memory");
  cudaLaunchAttribute attributes[3]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = shape.start == Start::kOverlapping;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = shape.start == Start::kTogether;
  attributes[2].id = cudaLaunchAttributeClusterDimension;
  attributes[2].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = shape.grid;
  launch.blockDim = shape.threads;
  launch.dynamicSmemBytes = kSharedBytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = attributes;
  launch.numAttrs = shape.cluster > 1 ? 3 : 2;
  check(cudaLaunchKernelEx(&launch, kKernel, params...), name);
}

}  // namespace mixed_attention::cuda::hopper
