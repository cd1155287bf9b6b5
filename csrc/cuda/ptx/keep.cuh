// Keeps values in their registers.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::ptx {

// Hides where a value comes from: the compiler, which would rather compute an address again in every round of a loop
// than hold it, keeps it in a register.
__device__ inline uint32_t keep(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ inline int keep(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <class T>
__device__ T* keep(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

}  // namespace mixed_attention::cuda::ptx
