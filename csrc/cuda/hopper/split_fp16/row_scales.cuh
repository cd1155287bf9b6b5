// The row_scales of fp32 tensors that came in as limbs (half_limbs.h).
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::hopper {

// The row_scales of a head's rows, from row 0 on; batch_step: 1, or 0 where one sequence serves the whole batch.
template <typename Rows>
__device__ inline const float* row_scales_of_head(const float* row_scales, const Rows& rows, int batch_step,
                                                  int num_heads, int64_t seqlen) {
  return row_scales + (rows.batch * batch_step * num_heads + rows.head) * seqlen;
}

}  // namespace mixed_attention::cuda::hopper
