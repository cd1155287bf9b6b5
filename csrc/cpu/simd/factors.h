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
  using Lane = F;
  static constexpr int kTerms = 1;
  static constexpr bool kIsTiled = false;
};
template <class F>
using SumOf = typename FactorTraits<F>::Sum;
template <class F>
using FactorVec = Vec<typename FactorTraits<F>::Lane>;
template <class F>
inline constexpr int kTerms = FactorTraits<F>::kTerms;
// Whether products run in tile registers, which are filled from memory: A with its depth along the rows, B across them.
template <class F>
inline constexpr bool kIsTiled = FactorTraits<F>::kIsTiled;

// Rows of a product, and factors along its depth, are rounded up to these.
template <class F>
inline constexpr int64_t kRowBlock = kIsTiled<F> ? 32 : 6;
template <class F>
inline constexpr int64_t kDepthBlock = kIsTiled<F> ? 16 : 1;

// How many factors hold so many terms; behind the last term is zero.
template <class F>
constexpr int64_t num_factors(int64_t terms) {
  return (terms + kTerms<F> - 1) / kTerms<F>;
}
// The same in whole blocks: the depth of a product, behind the last term zero.
template <class F>
constexpr int64_t depth_of(int64_t terms) {
  return round_up(num_factors<F>(terms), kDepthBlock<F>);
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

// Two neighbouring vectors as factors, in their order.
template <class V, class T>
inline void store_two(T* p, V first, V second) {
  store(p, first);
  store(p + kLanes<T>, second);
}

// The factor that starts at an element.
template <class Element, class T>
inline void make_factor(const Element* in, T& out) {
  out = to_accumulator(*in);
}

// As many factors as a vector holds.
template <class F, class Element>
inline FactorVec<F> make_factors(const Element* in) {
  if constexpr (kTerms<F> == 1) {
    F factors[kLanes<F>];
    for (int i = 0; i < kLanes<F>; ++i) factors[i] = to_accumulator(in[i]);
    return load(factors);
  } else {
    FactorVec<F> factors;
    std::memcpy(&factors, in, sizeof(factors));
    return factors;
  }
}
template <class T, class V>
inline void store_factors(T* p, V v) {
  store(p, v);
}

#if MIXED_ATTENTION_BFLOAT16_PAIRS
struct BFloat16Pair {
  uint32_t bits;  // the first in the low half
};
template <>
struct FactorTraits<BFloat16Pair> {
  using Sum = float;
  using Lane = uint32_t;
  static constexpr int kTerms = 2;
  static constexpr bool kIsTiled = MIXED_ATTENTION_TILES;
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
inline void make_factor(const BFloat16* in, BFloat16Pair& out) { out = pair_of(in[0], in[1]); }
inline void store_factors(BFloat16Pair* p, Vec<uint32_t> v) { store(&p->bits, v); }
// Half a pair at the end of a row.
inline void make_last_factor(const BFloat16* in, BFloat16Pair& out) { out.bits = in[0].bits; }

// Pairs of what stands below each other in two rows; null is a row of zeros.
inline void zip_rows(const BFloat16* first, const BFloat16* second, int64_t size, BFloat16Pair* out) {
  if (first && second) {
    for (int64_t i = 0; i < size; ++i) out[i] = pair_of(first[i], second[i]);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      out[i] = pair_of(first ? first[i] : BFloat16{0}, second ? second[i] : BFloat16{0});
    }
  }
}

// Neighbouring lanes paired: those of the first vector, then those of the second.
inline Vec<uint32_t> to_pairs(Vec<float> first, Vec<float> second) {
  return (Vec<uint32_t>)_mm512_cvtne2ps_pbh(second, first);
}
inline void store_two(BFloat16Pair* p, Vec<float> first, Vec<float> second) {
  store(&p->bits, to_pairs(first, second));
}

// Pair i is that of lane i of both.
inline void store_zipped(BFloat16Pair* p, Vec<float> first, Vec<float> second) {
  alignas(64) static constexpr int16_t kZip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = (__m512i)to_pairs(first, second);
  store(&p->bits, (Vec<uint32_t>)_mm512_permutexvar_epi16(_mm512_load_si512(kZip), pairs));
}
#endif

template <class Element>
using Factor = typename FactorOf<Element>::type;

#if MIXED_ATTENTION_TILES
// Depth across the rows, which become columns: out[d][i / 2] pairs rows i and i + 1, and is zero from size to channels,
// and where there is no row.
template <class RowAt>
inline void pack_rows_as_columns(int64_t count, int64_t size, RowAt row_at, BFloat16Pair* out, int64_t channels,
                                 int64_t stride) {
  constexpr int kSquare = kLanes<float>;
  for (int64_t i = 0; i < count; i += 2 * kSquare) {
    const BFloat16* rows[2 * kSquare];
    for (int j = 0; j < 2 * kSquare; ++j) rows[j] = row_at(i + j);
    for (int64_t d = 0; d < channels; d += kSquare) {
      const int64_t width = size - d;
      const auto mask = static_cast<__mmask16>(width < kSquare ? (1 << width) - 1 : 0xFFFF);
      const auto widened = [&](const BFloat16* row) {
        const __m256i bits = _mm256_maskz_loadu_epi16(row ? mask : __mmask16{0}, row + (row ? d : 0));
        return (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xFFFF, bits);  // masked as in vec.h, exp2
      };
      Vec<uint32_t> square[kSquare];
      for (int j = 0; j < kSquare; ++j) {
        square[j] = widened(rows[2 * j]) | widened(rows[2 * j + 1]) << 16;
      }
      transpose(square);
      for (int j = 0; j < kSquare; ++j) store_factors(out + (d + j) * stride + i / 2, square[j]);
    }
  }
}
#endif

// Depth along the row: its factors, zero behind them up to width; all zero without a row. Numbers of the accumulation
// type are multiplied by scale; pairs are packed as they are.
template <class Element, class F>
inline void pack_row(const Element* row, int64_t size, F* out, int64_t width, SumOf<F> scale = 1) {
  const int64_t full = row ? size / kTerms<F> : 0;
  if constexpr (kTerms<F> == 2) {
    if (row) std::memcpy(out, row, full * sizeof(F));
  } else {
    for (int64_t i = 0; i < full; ++i) out[i] = scale * to_accumulator(row[i]);
  }
  for (int64_t i = full; i < width; ++i) out[i] = F{};
  if constexpr (kTerms<F> == 2) {
    if (row && size % 2) make_last_factor(row + size - 1, out[full]);
  }
}

// Depth along the rows, which become columns: out[d][i] = factor d of row i, zero from count to columns and behind the
// last factor.
template <class Element, class F, class RowAt>
inline void pack_columns(int64_t count, int64_t size, RowAt row_at, F* out, int64_t columns, int64_t stride) {
  constexpr int kLane = kLanes<SumOf<F>>;
  const int64_t square_rows = count / kLane * kLane, square_factors = size / kTerms<F> / kLane * kLane;
  for (int64_t i = 0; i < square_rows; i += kLane) {
    const Element* rows[kLane];
    for (int j = 0; j < kLane; ++j) rows[j] = row_at(i + j);
    for (int64_t d = 0; d < square_factors; d += kLane) {
      FactorVec<F> square[kLane];
      for (int j = 0; j < kLane; ++j) square[j] = make_factors<F>(rows[j] + d * kTerms<F>);
      transpose(square);
      for (int j = 0; j < kLane; ++j) store_factors(out + (d + j) * stride + i, square[j]);
    }
  }
  for (int64_t i = 0; i < columns; ++i) {
    const Element* row = i < count ? row_at(i) : nullptr;
    for (int64_t d = i < square_rows ? square_factors : 0; d < depth_of<F>(size); ++d) {
      F& factor = out[d * stride + i];
      factor = F{};
      if (row && (d + 1) * kTerms<F> <= size) make_factor(row + d * kTerms<F>, factor);
      if constexpr (kTerms<F> == 2) {
        if (row && 2 * d + 1 == size) make_last_factor(row + 2 * d, factor);
      }
    }
  }
}

// Depth across the rows: out[i / kTerms][d], zero from size to width. Where row_at(i) is null the row is zero; it is
// asked up to the last term of the last factor.
template <class Element, class F, class RowAt>
inline void pack_rows(int64_t count, int64_t size, RowAt row_at, F* out, int64_t width) {
  for (int64_t i = 0; i < count; i += kTerms<F>, out += width) {
    const Element* row = row_at(i);
    if constexpr (kTerms<F> == 1) {
      pack_row(row, size, out, width);
    } else {
      zip_rows(row, row_at(i + 1), size, out);
      for (int64_t d = size; d < width; ++d) out[d] = F{};
    }
  }
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
