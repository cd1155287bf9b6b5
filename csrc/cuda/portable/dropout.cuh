// Which attention weights dropout keeps: reference.py, dropout_keep, has the definition.
#pragma once

#include <cstdint>

#include "params.h"

namespace mixed_attention::cuda {

// The host's part, handed to kernels by value.
struct DropoutParams {
  const int64_t* seed;  // null: no dropout
  uint32_t threshold;
  float inverse_keep_probability;  // 0 where nothing is kept
};

inline DropoutParams dropout_params(const AttentionParams& params) {
  if (params.dropout_p <= 0) return {};
  // 65536 * p rounded half to even like Python's round; exact, as the product with a power of two is.
  const double scaled = 65536 * params.dropout_p;
  uint32_t threshold = static_cast<uint32_t>(scaled);
  const double rest = scaled - threshold;
  if (rest > 0.5 || (rest == 0.5 && (threshold & 1))) ++threshold;
  const float inverse = threshold < 65536 ? static_cast<float>(65536.0 / (65536.0 - threshold)) : 0.0f;
  return {params.dropout_seed, threshold, inverse};
}

class Dropout {
 public:
  __device__ Dropout(const DropoutParams& params, int batch_head)
      : threshold_(params.threshold),
        inverse_keep_probability_(params.inverse_keep_probability),
        batch_head_(static_cast<uint32_t>(batch_head)) {
    const uint64_t seed = static_cast<uint64_t>(*params.seed);
    key_[0] = static_cast<uint32_t>(seed);
    key_[1] = static_cast<uint32_t>(seed >> 32);
  }

  // The factor on p of the key at position x of its range.
  __device__ float factor_at(int query_row, int range_index, int x) const {
    return factor(draw(query_row, range_index, x), x);
  }

  __device__ float factor(const uint4& words, int x) const {
    const int index = x % 32 / 8;
    const uint32_t word = index < 2 ? (index == 0 ? words.x : words.y) : (index == 2 ? words.z : words.w);
    return (word >> (x % 2 * 16) & 0xFFFF) >= threshold_ ? inverse_keep_probability_ : 0.0f;
  }

  // Philox-4x32-10: four words that decide over the positions x' of a window of 32 with the x' % 8 / 2 of x, which are
  // what one thread holds of 32 columns in the layout of mma's accumulators.
  __device__ uint4 draw(int query_row, int range_index, int x) const {
    uint4 c = make_uint4(static_cast<uint32_t>(query_row), static_cast<uint32_t>(x / 32 * 4 + x % 8 / 2),
                         static_cast<uint32_t>(range_index), batch_head_);
    uint32_t k0 = key_[0], k1 = key_[1];
// A loop, for its code and registers would be those of every kernel, most calls of which drop nothing.
#pragma unroll 1
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const uint64_t a = uint64_t{c.x} * 0xD2511F53u, b = uint64_t{c.z} * 0xCD9E8D57u;
      c = make_uint4(static_cast<uint32_t>(b >> 32) ^ c.y ^ k0, static_cast<uint32_t>(b),
                     static_cast<uint32_t>(a >> 32) ^ c.w ^ k1, static_cast<uint32_t>(a));
    }
    return c;
  }

 private:
  uint32_t threshold_;
  float inverse_keep_probability_;
  uint32_t batch_head_;
  uint32_t key_[2];
};

}  // namespace mixed_attention::cuda
