// Kernels that follow one another in a stream and overlap: the next one's blocks come while the last of this one's run.
//
// Both do nothing where the launch did not ask for it (cuda/hopper/tile/launch_kernel.cuh).
#pragma once

namespace mixed_attention::cuda::ptx {

// From here on blocks of the next grid may come to where there is room, once all blocks of this one have.
__device__ inline void allow_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until all grids before this one have ended and what they wrote can be seen. Nothing in global memory may be touched
// before it, neither read nor written.
__device__ inline void wait_for_grids_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace mixed_attention::cuda::ptx
