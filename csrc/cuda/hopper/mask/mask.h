// Keys and values under a padding mask, as the kernels read them.
#pragma once

#include <cstdint>

#include "cuda/common/scratch.h"
#include "cuda/hopper/plan/tensor_map.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// A bit for every key, least significant first, and copies in which what belongs to masked keys is zeros: their p is
// zero, but what they hold may be infinite.
struct MaskedKeys {
  uint32_t* key_mask_bits;  // (num_sequences, num_words)
  void* values;             // (num_sequences, seqlen_k, num_heads, head_dim_v)
  void* keys;               // likewise, of head_dim; null in the forward, which selects among the scores
  int num_sequences;        // one for each sequence, or one for all
  int num_words;            // with kSpareWords behind the last key, which may be read

  static constexpr int kSpareWords = 4;

  // Words from one sequence's bits to the next one's.
  int key_mask_step() const { return num_sequences > 1 ? num_words : 0; }
};

MaskedKeys plan_masked_keys(const AttentionParams& params, Scratch& scratch, bool copies_keys);

// One of the copies, of heads of such a width.
TensorView masked_view(const AttentionParams& params, const MaskedKeys& keys, const void* copy, int64_t head_dim);

// Enqueues the kernel that writes all of it.
void launch_mask(const AttentionParams& params, const MaskedKeys& keys);

}  // namespace mixed_attention::cuda::hopper
