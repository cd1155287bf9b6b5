// Rows of the element type in memory, to and from the type that is computed in.
#pragma once

#include <cstring>

#include "cpu/simd/vec.h"

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

template <class Element>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class Element>
using Accumulator = typename AccumulatorOf<Element>::type;

inline float to_accumulator(float x) { return x; }
inline double to_accumulator(double x) { return x; }
inline float to_accumulator(Float16 x) { return static_cast<float>(x); }
inline float to_accumulator(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline void from_accumulator(float x, float& result) { result = x; }
inline void from_accumulator(double x, double& result) { result = x; }
inline void from_accumulator(float x, Float16& result) { result = static_cast<Float16>(x); }
inline void from_accumulator(float x, BFloat16& result) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // To nearest, ties to even; a NaN must not be rounded up into an infinity.
  result.bits = x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Asks for a row that is wanted soon.
template <class T>
inline void prefetch_row(const T* row, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// out[i] = scale * in[i]
template <class Element, class Acc>
inline void store_row(const Acc* in, int64_t size, Acc scale, Element* out) {
  for (int64_t i = 0; i < size; ++i) from_accumulator(scale * in[i], out[i]);
}

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
