// A row of the output once more, by plain arithmetic: where tensor cores left no finite numbers although there may be
// some. Sums of weighted values may overflow on their way to a mean that does not, and of MMAs of limbs infinities
// come out as NaN, also those that are no more than a score whose p is 0. Such rows are seldom; they are computed
// by a warp each, behind the kernel's own way out, which costs all others a look at their outputs.
#pragma once

#include "cuda/common/row_lse.h"
#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda::portable {

// Whose query and keys have up to kHeadDim columns, a lane every 32nd of them; values likewise.
template <class Element, int kHeadDim>
class PlainRow {
 public:
  __device__ PlainRow(const Element* q, int head_dim, int head_dim_v, float scale_log2)
      : head_dim_(head_dim), head_dim_v_(head_dim_v), scale_log2_(scale_log2) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) q_[i] = column(i) < head_dim ? static_cast<float>(q[column(i)]) : 0;
  }

  // for_each_key(visit) calls visit(key, value, function that gives dropout's factor) for every visible key, as often
  // as it is listed, in all lanes, until one returns false. Returns what the row comes to; NaN in it where a score is
  // NaN or the infinity above all others: the row then is no number either.
  template <class ForEachKey>
  __device__ RowLse compute(const ForEachKey& for_each_key) {
    float largest = -INFINITY;
    for_each_key([&](const Element* k, const Element*, const auto&) {
      const float s = score(k);
      largest = s <= largest ? largest : s;  // and NaN stays
      return largest < INFINITY;
    });
    if (largest == -INFINITY) return {0, 0, -INFINITY};
    if (!(largest < INFINITY)) return {0, 0, NAN};
    const auto unnormalised_p = [&](const Element* k) { return ptx::exp2((score(k) - largest) * scale_log2_); };
    float sum = 0;
    for_each_key([&](const Element* k, const Element*, const auto&) {
      sum += unnormalised_p(k);
      return true;
    });
    // p is divided by its sum before it meets a value, and what rounding took beyond the end comes back.
    float size[kColumns] = {};
    for_each_key([&](const Element* k, const Element* v, const auto& factor) {
      const float p = unnormalised_p(k) / sum * factor();
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (column(i) >= head_dim_v_) continue;
        const float value = static_cast<float>(v[column(i)]);
        out_[i] = fmaf(p, value, out_[i]);
        size[i] = fmaxf(size[i], fabsf(value));
      }
      return true;
    });
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (isinf(out_[i]) && size[i] < INFINITY) out_[i] = copysignf(size[i], out_[i]);
    }
    return {largest, 0, log2f(sum)};
  }

  template <class Target>
  __device__ void store(Target* out, float factor) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (column(i) < head_dim_v_) out[column(i)] = Target(out_[i] * factor);
    }
  }

 private:
  static constexpr int kColumns = kHeadDim / 32;

  __device__ static int column(int i) { return threadIdx.x % 32 + 32 * i; }

  __device__ float score(const Element* k) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (column(i) < head_dim_) sum = fmaf(q_[i], static_cast<float>(k[column(i)]), sum);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, lanes);
    return sum;
  }

  int head_dim_, head_dim_v_;
  float scale_log2_;
  float q_[kColumns], out_[kColumns] = {};
};

}  // namespace mixed_attention::cuda::portable
