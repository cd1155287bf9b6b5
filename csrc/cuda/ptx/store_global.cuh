// Stores to global memory.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::ptx {

// 16 bytes by one store. The assignment of a uint4 becomes four stores where ptxas finds no four registers in a row.
__device__ inline void store_four(void* global, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

}  // namespace mixed_attention::cuda::ptx
