// The kernels of the instruction set that this file is compiled for.
#pragma once

#include "cpu/simd/bwd_jvp_kernel.h"
#include "cpu/simd/bwd_kernel.h"
#include "cpu/simd/fwd_kernel.h"
#include "cpu/simd/jvp_kernel.h"
#include "cpu/simd/rms_rope_kernel.h"
#include "cpu/simd/rope_derivatives_kernel.h"
#include "cpu/simd/rope_kernel.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

template <class Element>
constexpr AttentionKernels kernels() {
  using F = Factor<Element>;
  return {kRowBlock<F>,      sizeof(F) / kTerms<F>, fwd<Element>,          measure<Element>, delta<Element>,
          bwd<Element>,      jvp<Element>,          bwd_jvp_rows<Element>, bwd_jvp<Element>, rope<Element>,
          rms_rope<Element>, rope_jvp<Element>,     rope_backward<Element>};
}

// In the order of DType.
constexpr InstructionSet instruction_set(const char* name, bool (*is_available)()) {
  return {name, is_available, {kernels<float>(), kernels<double>(), kernels<BFloat16>(), kernels<Float16>()}};
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
