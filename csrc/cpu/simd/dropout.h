// Which attention weights dropout keeps: reference.py, dropout_keep, has the definition.
#pragma once

#include "cpu/simd/keys.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

struct Dropout {
  uint32_t threshold;
  uint32_t key[2];
  double inverse_keep_probability;  // 0 where nothing is kept

  explicit Dropout(const AttentionParams& p) {
    // 65536 * p rounded half to even like Python's round; exact, as the product with a power of two is.
    const double scaled = 65536 * p.dropout_p;
    uint32_t rounded = static_cast<uint32_t>(scaled);
    const double rest = scaled - rounded;
    if (rest > 0.5 || (rest == 0.5 && (rounded & 1))) ++rounded;
    threshold = rounded;
    const uint64_t seed = p.dropout_seed ? static_cast<uint64_t>(*p.dropout_seed) : 0;
    key[0] = static_cast<uint32_t>(seed);
    key[1] = static_cast<uint32_t>(seed >> 32);
    inverse_keep_probability = rounded < 65536 ? 65536.0 / (65536.0 - rounded) : 0;
  }

  // Philox-4x32-10.
  void draw(const uint32_t (&counter)[4], uint32_t (&words)[4]) const {
    uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const uint64_t a = uint64_t{c[0]} * 0xD2511F53u, b = uint64_t{c[2]} * 0xCD9E8D57u;
      const uint32_t c1 = c[1], c3 = c[3];
      c[0] = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
      c[1] = static_cast<uint32_t>(b);
      c[2] = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
      c[3] = static_cast<uint32_t>(a);
    }
    for (int i = 0; i < 4; ++i) words[i] = c[i];
  }

  // weights[i] = 1 / keep probability for kept keys, 0 for dropped ones.
  template <class Acc>
  void weights(int64_t query_row, int64_t batch_head, const Key* keys, int64_t count, Acc* weights) const {
    uint32_t words[4][4];  // of the window of 32 keys at hand, by t
    int64_t window = -1, range_index = -1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t x = keys[i].offset;
      if (x / 32 != window || keys[i].range_index != range_index) {
        window = x / 32;
        range_index = keys[i].range_index;
        for (uint32_t t = 0; t < 4; ++t) {
          draw({static_cast<uint32_t>(query_row), static_cast<uint32_t>(4 * window + t),
                static_cast<uint32_t>(range_index), static_cast<uint32_t>(batch_head)},
               words[t]);
        }
      }
      const uint32_t half = words[x % 8 / 2][x % 32 / 8] >> (x % 2 * 16) & 0xFFFF;
      weights[i] = half >= threshold ? static_cast<Acc>(inverse_keep_probability) : Acc(0);
    }
  }
};

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
