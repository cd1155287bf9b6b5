// The references of rows of large scores: how they are found, by plain arithmetic and beside the tensor cores, and what
// becomes of scores.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/row_reference.h"
#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda {

// lse_log2 is a log-sum-exp in base 2, -inf without keys, NaN where a p is NaN.
__device__ inline bool needs_reference(float lse_log2) { return fabsf(lse_log2) > 0x1p12f && lse_log2 != -INFINITY; }

// A score relative to its row's reference.
__device__ __forceinline__ float relative_score(float score, const RowReference& reference) {
  const float difference = score - reference.score;
  return difference < -reference.slack ? difference : 0;
}

// The products of a row's scores, by eight neighbouring lanes.
template <class Element>
class RowProducts {
 public:
  static constexpr int kLanes = 8;

  __device__ RowProducts(const Element* q, int num_columns) : q_(q), num_columns_(num_columns) {}

  // The score of a key, in all lanes.
  __device__ float score(const Element* k) const {
    float sum = 0;
#pragma unroll 2
    for (int i = lane(); i < num_columns_; i += kLanes) {
      sum = fmaf(static_cast<float>(q_[i]), static_cast<float>(k[i]), sum);
    }
    return sum_of_lanes(sum);
  }

  // The same. Takes note of by how much sums in another order and arithmetic may be off.
  __device__ float score_and_size(const Element* k) {
    float sum = 0, size = 0;
#pragma unroll 1
    for (int i = lane(); i < num_columns_; i += kLanes) {
      const float a = static_cast<float>(q_[i]), b = static_cast<float>(k[i]);
      sum = fmaf(a, b, sum);
      size += fabsf(a * b);
      note_bits(a, b);
    }
    size = sum_of_lanes(size);
    if (size < INFINITY) size_ = fmaxf(size_, size);
    return sum_of_lanes(sum);
  }

  // unit: the relative error of a sum of 128 products at most. Sums of few bits are exact.
  __device__ float slack(float unit) const {
    int lowest = lowest_bit_;
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) lowest = min(lowest, __shfl_xor_sync(mask(), lowest, lanes));
    const int highest = static_cast<int>(__float_as_uint(size_) >> 23) - 127;
    return highest < lowest + 23 ? 0 : size_ * (1 + num_columns_ / 128) * unit;
  }

  // The eight lanes of this one.
  __device__ static unsigned mask() { return 0xFFu << (threadIdx.x % 32 / kLanes * kLanes); }
  __device__ static int lane() { return threadIdx.x % kLanes; }

  __device__ static float sum_of_lanes(float x) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(mask(), x, lanes);
    return x;
  }

 private:
  static constexpr int kNone = 1 << 20;

  // The exponent of a number's lowest bit.
  __device__ static int lowest_bit(float x) {
    const uint32_t bits = __float_as_uint(x);
    return static_cast<int>(bits >> 23 & 0xFF) - 150 + __ffs(static_cast<int>((bits & 0x7FFFFF) | 0x800000)) - 1;
  }

  // Notes the lowest bit of a product. It is below all others where a factor has more than the 11 bits of a limb.
  __device__ void note_bits(float a, float b) {
    const bool counts = a != 0 && b != 0 && isfinite(a) && isfinite(b);
    const bool is_narrow = !std::is_same_v<Element, float> || ((__float_as_uint(a) | __float_as_uint(b)) & 0x1FFF) == 0;
    const int lowest = is_narrow ? lowest_bit(a) + lowest_bit(b) : -kNone;
    lowest_bit_ = counts ? min(lowest_bit_, lowest) : lowest_bit_;
  }

  const Element* q_;
  int num_columns_;
  float size_ = 0;          // the largest sum of the products' sizes
  int lowest_bit_ = kNone;  // its exponent, in this lane's products
};

// The reference of a row, by eight lanes. for_each_key(visit) calls visit(pointer to the key) for every visible key, as
// often as it is listed.
template <class Element, class ForEachKey>
__device__ inline RowReference find_reference(const Element* q, int num_columns, float scale_log2, float unit,
                                              const ForEachKey& for_each_key) {
  RowProducts<Element> products(q, num_columns);
  float largest = -INFINITY;
  for_each_key([&](const Element* k) { largest = fmaxf(largest, products.score_and_size(k)); });
  RowReference reference{largest, products.slack(unit), 0};
  float sum = 0;  // this lane has every eighth key
  int key = 0;
  for_each_key([&](const Element* k) {
    const float p = ptx::exp2(relative_score(products.score(k), reference) * scale_log2);
    if (key++ % products.kLanes == products.lane()) sum += p;
  });
  reference.sum_log2 = log2f(products.sum_of_lanes(sum));
  return reference;
}

}  // namespace mixed_attention::cuda
