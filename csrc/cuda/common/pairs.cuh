// Neighbouring pairs of channels in memory, as kernels over rows of heads load them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "params.h"

namespace mixed_attention::cuda {

// What one thread loads at a time, at once where it is aligned.
template <class Element, int kPairs, bool kAligned>
struct alignas(kAligned ? sizeof(Element) * 2 * kPairs : sizeof(Element)) Pairs {
  Element x[2 * kPairs];
};

// 16 bytes.
template <class Element>
inline constexpr int kPairsAtOnce = 8 / sizeof(Element);

// Whether vectors of `count` elements can be read wherever the tensor has one.
inline bool fits(const void* data, const Strides& strides, int64_t count, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(data) % (count * element_size) == 0 && strides.batch % count == 0 &&
         strides.row % count == 0 && strides.head % count == 0;
}

// Calls with a number of the type that the dtype stands for.
template <class Run>
void run_with_element(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat16: return run(__half());
    case DType::kBFloat16: return run(__nv_bfloat16());
    case DType::kFloat32: return run(float());
    case DType::kFloat64: return run(double());
  }
}

}  // namespace mixed_attention::cuda
