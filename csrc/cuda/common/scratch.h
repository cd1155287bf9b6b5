// Parts of a call's workspace.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ceil_div.h"

namespace mixed_attention::cuda {

// Where a part of some memory may begin: at multiples of this many bytes, as what cudaMalloc returns.
inline constexpr size_t kPartAlignment = 256;

// What a part of so many bytes takes, so that the next one may begin behind it.
constexpr size_t part_bytes(size_t bytes) { return round_up(bytes, kPartAlignment); }

// Hands out aligned parts of the workspace; without one it counts their bytes.
class Scratch {
 public:
  explicit Scratch(void* workspace) : base_(static_cast<char*>(workspace)) {}

  template <class T>
  T* take(int64_t count) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += part_bytes(static_cast<size_t>(count) * sizeof(T));
    return part;
  }

  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

}  // namespace mixed_attention::cuda
