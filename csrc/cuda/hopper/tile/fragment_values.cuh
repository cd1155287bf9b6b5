// Numbers that belong to the rows or to the columns of an MMA's result, by the accumulators of a thread.
#pragma once

#include "cuda/hopper/fwd/softmax.cuh"

namespace mixed_attention::cuda::hopper {

// One number for each of a thread's two rows.
struct RowNumbers {
  float of_row[2];

  __device__ float operator[](int i) const { return of_row[row_of(i)]; }
};

// One number for each column, from shared memory.
class ColumnNumbers {
 public:
  __device__ explicit ColumnNumbers(const float* numbers) : own_(numbers + 2 * (threadIdx.x % 4)) {}

  __device__ float operator[](int i) const {
    const float2 pair = *reinterpret_cast<const float2*>(own_ + 8 * (i / 4));
    return i % 2 == 0 ? pair.x : pair.y;
  }

 private:
  const float* own_;
};

}  // namespace mixed_attention::cuda::hopper
