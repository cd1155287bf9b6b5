// Outputs that overflow although their quotient by the row sum of p would not. Values of bf16 may be as large as any
// number of fp32, in which p v is added up, and p is about 1, where it is most exact. A block that finds such an output
// goes through its items once more: repair.cuh.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/softmax.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
inline constexpr bool kMayOverflow = std::is_same_v<typename Config::Element, __nv_bfloat16>;

// Takes note of outputs of a thread's two rows that are not finite; exists: of each row.
template <template <typename> typename SharedStorage, typename Config>
__device__ inline void note_overflow(SharedStorage<Config>& shared, const float (&o)[Config::kHeadDim / 2],
                                     const bool (&exists)[2]) {
  float zero[2] = {};  // NaN of a row that has such an output
#pragma unroll
  for (int i = 0; i < Config::kHeadDim / 2; ++i) zero[row_of(i)] = fmaf(o[i], 0.f, zero[row_of(i)]);
  if ((exists[0] && zero[0] != 0) || (exists[1] && zero[1] != 0)) atomicExch(&shared.has_overflowed, 1);
}

}  // namespace mixed_attention::cuda::hopper
