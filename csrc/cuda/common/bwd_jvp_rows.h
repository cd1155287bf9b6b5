// What the backward of tangents knows of each query before its large kernels begin, (batch_size, num_heads, seqlen_q)
// each.
#pragma once

#include "cuda/common/row_reference.h"

namespace mixed_attention::cuda {

struct BwdJvpRows {
  const float* lse_log2;  // +inf for rows without keys; relative to the reference where there is one
  const float *mu, *eps, *gamma;
  const RowReference* references;
  const int* has_references;  // one word, 0 where no row has one
};

}  // namespace mixed_attention::cuda
