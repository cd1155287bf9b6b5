// The vector width of the instruction set that this file is compiled for. Everything above is written once.
//
// Included by avx512.cpp, avx2.cpp and portable.cpp, which define MIXED_ATTENTION_ISA (the namespace),
// MIXED_ATTENTION_VECTOR_BYTES and MIXED_ATTENTION_VECTOR_REGISTERS.
#pragma once

#include <cstdint>
#include <type_traits>

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

template <class T>
inline T reduce_max(Vec<T> v) {
  T result = v[0];
  for (int i = 1; i < kLanes<T>; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

template <class T>
inline T reduce_sum(Vec<T> v) {
  T result = v[0];
  for (int i = 1; i < kLanes<T>; ++i) result += v[i];
  return result;
}

// 2^x for x <= 0, also -inf; what would be subnormal is 0, and NaN stays NaN. Chebyshev approximations of 2^f on
// [-1/2, 1/2], relative error 2e-9 (fp32) and 3e-18 (fp64) before rounding.
template <class T>
inline Vec<T> exp2_nonpositive(Vec<T> x) {
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

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
