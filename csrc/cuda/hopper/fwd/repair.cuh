// Outputs that overflow although their quotient by the sum of the weights would not. Values of bf16 may be as large as
// any number of fp32, in which weights times values are added up, and weights are about 1, where they are most exact. A
// block that finds such an output goes through all its items once more, with weights of 2^-64 at most, and replaces
// what was not finite. Where a value is infinite or NaN that changes nothing but the time.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/softmax.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
inline constexpr bool kMayOverflow = std::is_same_v<typename Config::Element, __nv_bfloat16>;

// Whether the block is to go through its items once more; all its threads ask at a time, after the last item.
template <typename Config>
__device__ inline bool must_repair(FwdSharedStorage<Config>& shared) {
  if constexpr (!kMayOverflow<Config>) return false;
  __syncthreads();
  const bool must = shared.repair.has_overflowed != 0 && shared.repair.is_repair == 0;
  if (!must) return false;
  __syncthreads();  // all threads have read it
  if (threadIdx.x == 0) shared.repair.is_repair = 1;
  __syncthreads();
  return true;
}

// Takes note of outputs of a thread's two rows that are not finite; exists: of each row.
template <typename Config>
__device__ inline void note_overflow(FwdSharedStorage<Config>& shared, const float (&o)[Config::kHeadDim / 2],
                                     const bool (&exists)[2]) {
  float zero[2] = {};  // NaN of a row that has such an output
#pragma unroll
  for (int i = 0; i < Config::kHeadDim / 2; ++i) zero[row_of(i)] = fmaf(o[i], 0.f, zero[row_of(i)]);
  if ((exists[0] && zero[0] != 0) || (exists[1] && zero[1] != 0)) atomicExch(&shared.repair.has_overflowed, 1);
}

// Writes one of a thread's two rows, i, times a factor, where memory has no finite numbers. out: the row in memory, of
// num_columns.
template <typename Element, int kCount>
__device__ inline void replace_row(Element* out, int num_columns, const float (&o)[kCount], int i, float factor) {
#pragma unroll
  for (int column = 0; column < 2 * kCount; column += 8) {
    const int own_column = column + threadIdx.x % 4 * 2;
    if (own_column >= num_columns) break;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Element& number = out[own_column + j];
      if (!isfinite(static_cast<float>(number))) number = Element(o[column / 2 + 2 * i + j] * factor);
    }
  }
}

}  // namespace mixed_attention::cuda::hopper
