// The vector width of the instruction set that this file is compiled for. Everything above is written once.
//
// Included by amx.cpp, avx512_bf16.cpp, avx512.cpp, avx2.cpp and portable.cpp, which define MIXED_ATTENTION_ISA (the
// namespace), MIXED_ATTENTION_VECTOR_BYTES, MIXED_ATTENTION_VECTOR_REGISTERS and, where there are products of bfloat16
// pairs, MIXED_ATTENTION_BFLOAT16_PAIRS, and MIXED_ATTENTION_TILES: whether these run in tile registers.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

inline constexpr int kVectorBytes = MIXED_ATTENTION_VECTOR_BYTES;

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  // In memory it is aligned like its elements only, and may alias them.
  typedef T in_memory __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};

template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using VecInMemory = typename VecOf<T>::in_memory;

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const VecInMemory<T>*>(p);
}

template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<VecInMemory<T>*>(p) = v;
}

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Lanes of both by turns, out of their lower halves or their upper halves.
template <bool kUpper, class V, size_t... kLane>
inline V zip(V a, V b, std::index_sequence<kLane...>) {
  constexpr size_t kCount = sizeof...(kLane);
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kCount + kUpper * kCount / 2)...);
#else
  return V{(kLane % 2 ? b : a)[kLane / 2 + kUpper * kCount / 2]...};
#endif
}

// Row i of a square becomes column i.
template <class V, int kCount>
inline void transpose(V (&rows)[kCount]) {
  constexpr auto kLanes = std::make_index_sequence<kCount>();
#pragma GCC unroll 4
  for (int stage = 1; stage < kCount; stage *= 2) {
    V next[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      next[2 * i] = zip<false>(rows[i], rows[i + kCount / 2], kLanes);
      next[2 * i + 1] = zip<true>(rows[i], rows[i + kCount / 2], kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) rows[i] = next[i];
  }
}

// NOTE: always inline, here and below. A compiler that has inlined much already calls a function instead, and the inner
// loops of the forward are made of these.

// Folds the upper half of a vector onto the lower until one number is left.
template <class T, int kCount, class Fold>
[[gnu::always_inline]] inline T reduce(const T* p, Fold fold) {
  if constexpr (kCount == 1) {
    return *p;
  } else {
    T half[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) half[i] = fold(p[i], p[i + kCount / 2]);
    return reduce<T, kCount / 2>(half, fold);
  }
}

template <class T>
[[gnu::always_inline]] inline T reduce_max(Vec<T> v) {
  return reduce<T, kLanes<T>>(reinterpret_cast<const T*>(&v), [](T a, T b) { return a > b ? a : b; });
}

template <class T>
[[gnu::always_inline]] inline T reduce_sum(Vec<T> v) {
  return reduce<T, kLanes<T>>(reinterpret_cast<const T*>(&v), [](T a, T b) { return a + b; });
}

// Whether some lane is above the bound.
template <class T>
[[gnu::always_inline]] inline bool any_above(Vec<T> v, T bound) {
#if MIXED_ATTENTION_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(v, broadcast(bound), _CMP_GT_OQ) != 0;
#endif
  return reduce_max<T>(v) > bound;
}

// 2^x for x <= 0, also -inf, and for what is a little above 0; what would be subnormal may be 0, and NaN
// stays NaN. Chebyshev approximations of 2^f on [-1/2, 1/2], relative error 2e-9 (fp32) and 3e-18 (fp64) before
// rounding.
template <class T>
[[gnu::always_inline]] inline Vec<T> exp2(Vec<T> x) {
  using Int = IntOf<T>;
  constexpr bool kIsFloat = sizeof(T) == 4;
  constexpr T kLowest = kIsFloat ? T(-126) : T(-1022);
  // Adding 1.5 * 2^mantissa_bits rounds to the nearest integer and leaves it in the low bits.
  constexpr T kRound = kIsFloat ? T(12582912.0) : T(6755399441055744.0);
  constexpr int kMantissaBits = kIsFloat ? 23 : 52;
  const Vec<T> clamped = x > kLowest ? x : broadcast(kLowest);
  const Vec<T> shifted = clamped + kRound;
  const Vec<T> f = clamped - (shifted - kRound);
  Vec<T> p;
  if constexpr (kIsFloat) {
    p = broadcast(T(1.5461444698569e-4));
    p = p * f + T(1.34004281776158e-3);
    p = p * f + T(9.61805667852464e-3);
    p = p * f + T(5.55032722667030e-2);
    p = p * f + T(2.40226509222888e-1);
    p = p * f + T(6.93147206702833e-1);
    p = p * f + T(1);
  } else {
    p = broadcast(T(4.455817908336064493e-10));
    p = p * f + T(7.0741942972885210056e-9);
    p = p * f + T(1.0178057087733941105e-7);
    p = p * f + T(1.3215432535912376166e-6);
    p = p * f + T(1.5252733841556772589e-5);
    p = p * f + T(1.5403530463724354209e-4);
    p = p * f + T(1.3333558146406470697e-3);
    p = p * f + T(9.6181291075872566681e-3);
    p = p * f + T(5.5504108664821627039e-2);
    p = p * f + T(2.4022650695910159567e-1);
    p = p * f + T(6.9314718055994530925e-1);
    p = p * f + T(1);
  }
  const Vec<Int> exponent = reinterpret_cast<Vec<Int>>(shifted) << kMantissaBits;
  const Vec<T> result = reinterpret_cast<Vec<T>>(reinterpret_cast<Vec<Int>>(p) + exponent);
  return x >= kLowest ? result : x < 0 ? Vec<T>{} : x;
}

#if MIXED_ATTENTION_VECTOR_BYTES == 64
// AVX-512 has instructions for f = x - floor(x), 0 for -inf, and for p * 2^floor(x). On [0, 1), relative error 2e-9.
template <>
[[gnu::always_inline]] inline Vec<float> exp2<float>(Vec<float> x) {
  const Vec<float> f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec<float> p = broadcast(2.17022548726714e-4f);
  p = p * f + 1.24396879984801e-3f;
  p = p * f + 9.67884097752428e-3f;
  p = p * f + 5.54833419938032e-2f;
  p = p * f + 2.40229836271914e-1f;
  p = p * f + 6.93146983840783e-1f;
  p = p * f + 1.0f;
  // With a mask, because GCC 12 warns of its own header in the form without.
  return _mm512_maskz_scalef_ps(0xFFFF, p, x);
}
#endif

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
