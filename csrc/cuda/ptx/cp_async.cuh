// Copies from global to shared memory that pass by the registers.
#pragma once

#include "cuda/ptx/shared_address.cuh"

namespace mixed_attention::cuda::ptx {

// Copies 16 bytes; both addresses must be 16-byte aligned.
__device__ inline void cp_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared), "l"(global) : "memory");
}

// Copies the first `bytes` (0 to 16) of 16 and zeroes the rest; both addresses must be 16-byte aligned.
__device__ inline void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Starts the copy of one 4-byte word; bytes is 4 or 0.
__device__ inline void cp_async_4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Waits for all copies of this thread; what other threads copied needs a barrier as well.
__device__ inline void cp_async_wait_all() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

}  // namespace mixed_attention::cuda::ptx
