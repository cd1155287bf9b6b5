// Stands in for the warp's copy of a struct: the host has one lane.
#pragma once

namespace mixed_attention::cuda::ptx {

template <typename T, int kWords>
class WarpCopy {
 public:
  void read(const T* source) { copy_ = *source; }
  T get() const { return copy_; }

 private:
  T copy_{};
};

}  // namespace mixed_attention::cuda::ptx
