// Online softmax over the fragments of wgmma: a thread holds two rows of a tile, a quarter of their columns each.
#pragma once

#include "cuda/ptx/math.cuh"

namespace mixed_attention::cuda::hopper {

// Which of a thread's two rows accumulator i belongs to.
__device__ constexpr int row_of(int i) { return i / 2 % 2; }

// The four threads of a quad share their rows.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Scores of the columns from num_columns on become -inf.
template <int kCount>
__device__ inline void mask_columns(float (&scores)[kCount], int num_columns) {
  const int limit = num_columns - 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (8 * (i / 4) + i % 2 >= limit) scores[i] = -INFINITY;
  }
}

struct OnlineSoftmax {
  float row_max[2] = {-INFINITY, -INFINITY};  // reference of the exponents, at most kSlack below the maximum
  float row_sum[2] = {0.f, 0.f};              // of this thread's columns
  float factor[2];                            // of the last update: what older sums and outputs are to be scaled by
  bool rescale = false;                       // of the last update: whether any factor of this warp differs from 1

  // Turns scores into weights exp2(scale_log2 * (score - row_max)).
  //
  // The reference follows the maximum only once it is 8 behind in log2 units: weights of up to 2^8 lose nothing in
  // 16 bits, and most tiles need not touch the output. Each row decides by itself, so that no row depends on its
  // neighbours'. Every tile has a column that is not masked, therefore no maximum stays -inf.
  template <int kCount>
  __device__ void update(float (&scores)[kCount], float scale_log2) {
    constexpr float kSlack = 8.f;
    float tile_max[2] = {scores[0], scores[2]};
#pragma unroll
    for (int i = 0; i < kCount; ++i) tile_max[row_of(i)] = fmaxf(tile_max[row_of(i)], scores[i]);
    bool grows[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      tile_max[row] = quad_max(tile_max[row]);
      grows[row] = (tile_max[row] - row_max[row]) * scale_log2 > kSlack;
    }
    rescale = __any_sync(0xffffffff, grows[0] || grows[1]);
    if (rescale) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        factor[row] = grows[row] ? ptx::exp2((row_max[row] - tile_max[row]) * scale_log2) : 1.f;
        row_max[row] = grows[row] ? tile_max[row] : row_max[row];
        row_sum[row] *= factor[row];
      }
    }
    const float offset[2] = {-row_max[0] * scale_log2, -row_max[1] * scale_log2};
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = ptx::exp2(fmaf(scores[i], scale_log2, offset[row_of(i)]));
#pragma unroll
    for (int i = 0; i < kCount; ++i) row_sum[row_of(i)] += scores[i];
  }

  // Sums over whole rows; once, after the last update.
  __device__ void finish() {
    row_sum[0] = quad_sum(row_sum[0]);
    row_sum[1] = quad_sum(row_sum[1]);
  }

  // NOTE: ptxas moves most exponentials behind the wait for the product that they should run under. A store that
  // depends on all of them and never happens, as sums are not negative, holds them in front of it.
  __device__ void hold(uint32_t shared_address) const {
    asm volatile(
        "{\n"
        ".reg .pred negative;\n"
        "setp.lt.f32 negative, %1, 0f00000000;\n"
        "@negative st.shared.f32 [%0], %1;\n"
        "}\n" ::"r"(shared_address),
        "f"(row_sum[0] + row_sum[1])
        : "memory");
  }
};

}  // namespace mixed_attention::cuda::hopper
