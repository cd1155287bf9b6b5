// A copy of a small struct that a warp holds together.
#pragma once

namespace mixed_attention::cuda::ptx {

// The first kWords words of a T, one in each lane, read long before they are needed. ptxas knows that a whole copy is
// the same in all lanes, moves it to uniform registers at once, and so waits for memory where it is read.
template <typename T, int kWords>
class WarpCopy {
 public:
  __device__ void read(const T* source) { word_ = reinterpret_cast<const int*>(source)[threadIdx.x % 32 % kWords]; }

  // By all lanes.
  __device__ T get() const {
    T copy{};
    int* const words = reinterpret_cast<int*>(&copy);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_sync(0xffffffff, word_, i);
    return copy;
  }

 private:
  static_assert(kWords <= 32 && kWords * sizeof(int) <= sizeof(T), "a lane holds a word of the struct");

  int word_ = 0;
};

}  // namespace mixed_attention::cuda::ptx
