// Parts of a call's workspace.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mixed_attention::cuda {

// Hands out 256-byte aligned parts of the workspace; without one it counts their bytes.
class Scratch {
 public:
  explicit Scratch(void* workspace) : base_(static_cast<char*>(workspace)) {}

  template <class T>
  T* take(int64_t count) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return part;
  }

  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

}  // namespace mixed_attention::cuda
