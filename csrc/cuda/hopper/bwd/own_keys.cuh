// A thread has two key rows in kernels where keys are rows: its warp's row lane / 4 and the eighth one further on.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/fwd/softmax.cuh"

namespace mixed_attention::cuda::hopper {

// Tells which of the two rows count. Rows past the end of the keys do not, nor do masked ones: their p may be infinite.
template <bool kIsMasked>
class OwnKeys {
 public:
  // The warp's keys start at row_begin, num_rows of them exist.
  template <typename Params>
  __device__ OwnKeys(const Params& params, int batch, int row_begin, int num_rows) : state_(num_rows) {
    if constexpr (kIsMasked) {
      const uint32_t* key_mask_bits = params.key_mask_bits + int64_t{batch} * params.key_mask_step;
      int bits = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = row_begin + row(i);
        if (row(i) < num_rows) bits |= (key_mask_bits[key / 32] >> key % 32 & 1) << i;
      }
      state_ = bits;
    }
  }

  __device__ explicit OwnKeys(int num_rows) : state_(num_rows) {
    static_assert(!kIsMasked, "a mask says more of keys than their number");
  }

  __device__ bool count(int i) const { return kIsMasked ? (state_ >> i & 1) != 0 : row(i) < state_; }

 private:
  __device__ static int row(int i) { return threadIdx.x % 32 / 4 + 8 * i; }

  int state_;  // a bit for each under a mask, else the number of rows
};

// Gradients of keys that do not count are zeros, whatever they are.
template <int kCount>
__device__ inline void clear_other_keys(float (&gradient)[kCount], const OwnKeys<true>& keys) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) gradient[i] = keys.count(row_of(i)) ? gradient[i] : 0;
}

}  // namespace mixed_attention::cuda::hopper
