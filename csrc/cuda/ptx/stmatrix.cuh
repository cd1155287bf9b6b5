// Stores of 8x8 matrices of 16-bit elements, from the layout of an MMA's results.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::ptx {

// Four matrices; lanes 8i to 8i+7 give the shared addresses of the rows of matrix i.
__device__ inline void stmatrix_x4(uint32_t row_address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row_address), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// The same of transposed matrices: a row is what lanes hold as a column.
__device__ inline void stmatrix_x4_trans(uint32_t row_address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row_address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace mixed_attention::cuda::ptx
