// Additions to global memory that return nothing.
#pragma once

namespace mixed_attention::cuda::ptx {

#if __CUDA_ARCH__ >= 900
// Adds to two neighbouring numbers, 8-byte aligned.
__device__ inline void add_pair(float* pair, float first, float second) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};\n" ::"l"(pair), "f"(first), "f"(second) : "memory");
}
#endif

// Adds to four numbers in a row, 16-byte aligned.
__device__ inline void add_four(float* four, float first, float second, float third, float fourth) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(four), "f"(first), "f"(second), "f"(third),
               "f"(fourth)
               : "memory");
}

}  // namespace mixed_attention::cuda::ptx
