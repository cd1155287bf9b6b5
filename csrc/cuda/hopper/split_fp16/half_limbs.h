// fp32 tensors as one or two of fp16, which tensor cores multiply at full rate.
#pragma once

#include <span>

#include "cuda/common/scratch.h"
#include "cuda/hopper/plan/tensor_map.h"

namespace mixed_attention::cuda::hopper {

// A number is row_scale * (high + low) to 22 bits: high is the fp16 number next to it, low the one next to what is
// missing. The row_scale is a power of two, one for each row of a head, by which the row's largest finite number comes
// to lie between 2^14 and 2^15; numbers below 2^-18 of it are exact to 2^-39 of it. So no row depends on another,
// whatever that holds. What is not finite has no finite limbs' sum; infinity is 1 in high and infinity in low, and one
// limb is infinity.
//
// High alone is exact to 11 bits, as TF32 is, and for numbers below 2^-28 of the largest to 2^-39 of that.
struct HalfLimbs {
  void* limbs;        // (num_limbs, num_sequences, seqlen, num_heads, head_dim) in fp16: all of high, then all of low
  float* row_scales;  // (num_sequences, num_heads, seqlen)
  int num_limbs;      // 2, or 1 without low
  int num_sequences;  // one for each sequence, or one for all
};

// How many sequences of a tensor differ.
inline int num_sequences(const TensorView& tensor) {
  return tensor.strides.batch == 0 ? 1 : static_cast<int>(tensor.batch_size);
}

// All limbs as one tensor: low stands behind high, as sequences of its own.
inline TensorView limbs_view(const TensorView& tensor, const HalfLimbs& limbs) {
  const int64_t row = tensor.num_heads * tensor.head_dim;
  const Strides strides{tensor.seqlen * row, row, tensor.head_dim};
  return {limbs.limbs,     DType::kFloat16, limbs.num_limbs * limbs.num_sequences, tensor.seqlen, tensor.num_heads,
          tensor.head_dim, strides};
}

// Room for the limbs of a tensor.
inline HalfLimbs take_half_limbs(const TensorView& tensor, int num_limbs, Scratch& scratch) {
  const int num_different = num_sequences(tensor);
  const int64_t num_rows = num_different * tensor.num_heads * tensor.seqlen;
  return {scratch.take<uint16_t>(num_limbs * num_rows * tensor.head_dim), scratch.take<float>(num_rows), num_limbs,
          num_different};
}

// True if TMA can read a tensor, or, of fp32, its limbs, however many.
inline bool can_load(const TensorView& tensor) {
  if (tensor.dtype != DType::kFloat32) return can_map(tensor);
  return can_map(limbs_view(tensor, {nullptr, nullptr, 2, num_sequences(tensor)}));
}

struct HalfLimbsTask {
  TensorView source;  // fp32; head_dim a multiple of 8 up to 256
  HalfLimbs target;
};

inline constexpr int kMaxHalfLimbsTasks = 8;

// Enqueues one kernel that makes the limbs of all; stream: cudaStream_t.
void launch_half_limbs(std::span<const HalfLimbsTask> tasks, void* stream);

}  // namespace mixed_attention::cuda::hopper
