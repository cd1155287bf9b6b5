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

// Whether so many pairs can be read and written at once wherever the tensors of a call, those that are there, have
// them.
template <class Element>
struct Alignment {
  bool holds;

  explicit Alignment(int64_t head_dim) : holds(head_dim % kCount == 0) {}

  // step: from one of several such tensors to the next.
  Alignment& add(const void* data, const Strides& strides, int64_t step = 0) {
    holds = holds && (data == nullptr ||
                      (reinterpret_cast<uintptr_t>(data) % (kCount * sizeof(Element)) == 0 && step % kCount == 0 &&
                       strides.batch % kCount == 0 && strides.row % kCount == 0 && strides.head % kCount == 0));
    return *this;
  }

 private:
  static constexpr int64_t kCount = 2 * kPairsAtOnce<Element>;
};

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
