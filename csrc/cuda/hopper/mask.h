// Keys and values under a padding mask, as the forward reads them.
#pragma once

#include <cstdint>

#include "params.h"

namespace mixed_attention::cuda::hopper {

// A bit for every key, least significant first, and a copy of the values in which those of masked keys are zeros: their
// weight is zero, but what they hold may be infinite.
struct MaskedKeys {
  uint32_t* visible;  // (num_copies, num_words)
  void* values;       // (num_copies, seqlen_k, num_heads, head_dim)
  int num_copies;     // one for each sequence, or one for all
  int num_words;      // with kSpareWords behind the last key, which may be read

  static constexpr int kSpareWords = 4;
};

// Enqueues the kernel that writes both.
void launch_mask(const AttentionParams& params, const MaskedKeys& keys);

}  // namespace mixed_attention::cuda::hopper
