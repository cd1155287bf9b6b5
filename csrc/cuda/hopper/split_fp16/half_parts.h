// fp32 tensors as one or two of fp16, whose products tensor cores take at full rate.
#pragma once

#include <span>

#include "cuda/common/scratch.h"
#include "cuda/hopper/plan/tensor_map.h"

namespace mixed_attention::cuda::hopper {

// A number is row_scale * (high + low) to 22 bits: high is the fp16 number next to it, low the one next to what is
// missing. The row_scale is a power of two, one for each row of a head, by which the row's largest finite number comes
// to lie between 2^14 and 2^15; numbers below 2^-18 of it are exact to 2^-39 of it. So no row depends on another,
// whatever that holds. What is not finite has no finite parts' sum; infinity is 1 in high and infinity in low, and one
// part is infinity.
//
// High alone is exact to 11 bits, as TF32 is, and for numbers below 2^-28 of the largest to 2^-39 of that.
struct HalfParts {
  void* parts;        // (num_parts, copies, seqlen, num_heads, head_dim) in fp16: all of high, then all of low
  float* row_scales;  // (copies, num_heads, seqlen)
  int num_parts;      // 2, or 1 without low
  int copies;         // one for each sequence, or one for all
};

// How many sequences of a tensor differ.
inline int num_copies(const TensorView& tensor) {
  return tensor.strides.batch == 0 ? 1 : static_cast<int>(tensor.batch_size);
}

// All parts as one tensor: low stands behind high, as sequences of its own.
inline TensorView parts_view(const TensorView& tensor, const HalfParts& parts) {
  const int64_t row = tensor.num_heads * tensor.head_dim;
  const Strides strides{tensor.seqlen * row, row, tensor.head_dim};
  return {parts.parts,     DType::kFloat16, parts.num_parts * parts.copies, tensor.seqlen, tensor.num_heads,
          tensor.head_dim, strides};
}

// Room for the parts of a tensor.
inline HalfParts take_half_parts(const TensorView& tensor, int num_parts, Scratch& scratch) {
  const int copies = num_copies(tensor);
  const int64_t num_rows = copies * tensor.num_heads * tensor.seqlen;
  return {scratch.take<uint16_t>(num_parts * num_rows * tensor.head_dim), scratch.take<float>(num_rows), num_parts,
          copies};
}

// Whether TMA can read a tensor's parts, however many.
inline bool can_map_parts(const TensorView& tensor) {
  return can_map(parts_view(tensor, {nullptr, nullptr, 2, num_copies(tensor)}));
}

struct HalfPartsTask {
  TensorView source;  // fp32; head_dim a multiple of 8 up to 256
  HalfParts target;
};

inline constexpr int kMaxHalfPartsTasks = 8;

// Enqueues one kernel that makes the parts of all, which have the same head_dim; stream: cudaStream_t.
void launch_half_parts(std::span<const HalfPartsTask> tasks, void* stream);

}  // namespace mixed_attention::cuda::hopper
