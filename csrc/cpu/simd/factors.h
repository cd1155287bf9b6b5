// What the matrix products multiply, and how rows of the element type are packed into it.
//
// A factor holds kTerms neighbours along the depth of a product, the axis that is summed over: one number of the
// accumulation type, or two of bfloat16 where the machine multiplies pairs and adds both products to an fp32 sum.
#pragma once

#include "cpu/simd/convert.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

template <class F>
struct FactorTraits {
  using Sum = F;
  static constexpr int kTerms = 1;
};
template <class F>
using SumOf = typename FactorTraits<F>::Sum;
template <class F>
inline constexpr int kTerms = FactorTraits<F>::kTerms;

// How many factors hold so many terms; behind the last term is zero.
template <class F>
constexpr int64_t num_factors(int64_t terms) {
  return (terms + kTerms<F> - 1) / kTerms<F>;
}

template <class Element>
struct FactorOf {
  using type = Accumulator<Element>;
};

// A vector of factors, and one factor in every lane.
template <class T>
inline Vec<T> load_factors(const T* p) {
  return load(p);
}
template <class T>
inline Vec<T> broadcast_factor(T x) {
  return broadcast(x);
}
template <class V>
inline V multiply_add(V a, V b, V sum) {
  return a * b + sum;
}

// The factor that starts at an element, times sign, which is 1 or -1.
template <class Element, class T>
inline void make_factor(const Element* in, T sign, T& out) {
  out = sign * to_accumulator(*in);
}

#if MIXED_ATTENTION_BFLOAT16_PAIRS
struct BFloat16Pair {
  uint32_t bits;  // the first in the low half
};
template <>
struct FactorTraits<BFloat16Pair> {
  using Sum = float;
  static constexpr int kTerms = 2;
};
template <>
struct FactorOf<BFloat16> {
  using type = BFloat16Pair;
};

inline Vec<uint32_t> load_factors(const BFloat16Pair* p) { return load(&p->bits); }
inline Vec<uint32_t> broadcast_factor(BFloat16Pair x) { return Vec<uint32_t>{} + x.bits; }
inline Vec<float> multiply_add(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

inline BFloat16Pair pair_of(BFloat16 first, BFloat16 second) {
  return {first.bits | static_cast<uint32_t>(second.bits) << 16};
}
inline void make_factor(const BFloat16* in, float sign, BFloat16Pair& out) {
  out.bits = pair_of(in[0], in[1]).bits ^ (sign < 0 ? 0x80008000u : 0u);
}
// Half a pair at the end of a row.
inline void make_last_factor(const BFloat16* in, float sign, BFloat16Pair& out) {
  out.bits = in[0].bits ^ (sign < 0 ? 0x8000u : 0u);
}

// Pairs of what stands below each other in two rows; null is a row of zeros.
inline void zip_rows(const BFloat16* first, const BFloat16* second, int64_t size, float sign, BFloat16Pair* out) {
  const uint32_t flip = sign < 0 ? 0x80008000u : 0u;
  if (first && second) {
    for (int64_t i = 0; i < size; ++i) out[i].bits = pair_of(first[i], second[i]).bits ^ flip;
  } else {
    for (int64_t i = 0; i < size; ++i) {
      out[i].bits = pair_of(first ? first[i] : BFloat16{0}, second ? second[i] : BFloat16{0}).bits ^ flip;
    }
  }
}

inline void store_factors(BFloat16Pair* p, Vec<uint32_t> v) { store(&p->bits, v); }
// Neighbouring lanes paired: those of the first vector, then those of the second.
inline Vec<uint32_t> to_pairs(Vec<float> first, Vec<float> second) {
  return (Vec<uint32_t>)_mm512_cvtne2ps_pbh(second, first);
}
// Lane i is the pair of the i-th lanes of both.
inline Vec<uint32_t> zip_to_pairs(Vec<float> first, Vec<float> second) {
  alignas(64) static constexpr int16_t kZip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vec<uint32_t>)_mm512_permutexvar_epi16(_mm512_load_si512(kZip), (__m512i)to_pairs(first, second));
}
#endif

template <class Element>
using Factor = typename FactorOf<Element>::type;

// Depth along the row: its factors, zero behind them up to width; all zero without a row.
template <class Element, class F>
inline void pack_row(const Element* row, int64_t size, SumOf<F> sign, F* out, int64_t width) {
  const int64_t full = row ? size / kTerms<F> : 0;
  for (int64_t i = 0; i < full; ++i) make_factor(row + i * kTerms<F>, sign, out[i]);
  for (int64_t i = full; i < width; ++i) out[i] = F{};
  if constexpr (kTerms<F> == 2) {
    if (row && size % 2) make_last_factor(row + size - 1, sign, out[full]);
  }
}

// Depth along the rows, which become columns: out[d][i] = factor d of row i, zero from count to columns.
template <class Element, class F, class RowAt>
inline void pack_columns(int64_t count, int64_t size, RowAt row_at, F* out, int64_t columns) {
  constexpr int64_t kUnroll = 8;  // rows at a time: eight short streams of reads, one of writes
  const int64_t full = size / kTerms<F>;
  int64_t i = 0;
  for (; i + kUnroll <= count; i += kUnroll) {
    const Element* rows[kUnroll];
    for (int64_t j = 0; j < kUnroll; ++j) rows[j] = row_at(i + j);
    for (int64_t d = 0; d < full; ++d) {
      for (int64_t j = 0; j < kUnroll; ++j) {
        make_factor(rows[j] + d * kTerms<F>, SumOf<F>(1), out[d * columns + i + j]);
      }
    }
  }
  for (; i < columns; ++i) {
    const Element* row = i < count ? row_at(i) : nullptr;
    for (int64_t d = 0; d < full; ++d) {
      if (row)
        make_factor(row + d * kTerms<F>, SumOf<F>(1), out[d * columns + i]);
      else
        out[d * columns + i] = F{};
    }
  }
  if constexpr (kTerms<F> == 2) {
    for (i = 0; i < columns && size % 2; ++i) {
      out[full * columns + i] = F{};
      if (i < count) make_last_factor(row_at(i) + size - 1, SumOf<F>(1), out[full * columns + i]);
    }
  }
}

// Depth across the rows: out[i / kTerms][d], zero from size to width. Where row_at(i) is null the row is zero; it is
// asked up to the last term of the last factor.
template <class Element, class F, class RowAt>
inline void pack_rows(int64_t count, int64_t size, SumOf<F> sign, RowAt row_at, F* out, int64_t width) {
  for (int64_t i = 0; i < count; i += kTerms<F>, out += width) {
    const Element* row = row_at(i);
    if constexpr (kTerms<F> == 1) {
      pack_row(row, size, sign, out, width);
    } else {
      zip_rows(row, row_at(i + 1), size, sign, out);
      for (int64_t d = size; d < width; ++d) out[d] = F{};
    }
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
