// The kernels for AVX2 with FMA and F16C.
#include "cpu/simd/shared_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#define MIXED_ATTENTION_ISA avx2
#define MIXED_ATTENTION_VECTOR_BYTES 32
#define MIXED_ATTENTION_VECTOR_REGISTERS 16
#include "cpu/simd/table.h"

namespace mixed_attention::cpu {

const InstructionSet kAvx2 = avx2::instruction_set("AVX2", [] {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
});

}  // namespace mixed_attention::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
