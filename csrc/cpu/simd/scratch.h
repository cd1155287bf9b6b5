// Hands out 64-byte aligned pieces of a worker's scratch.
#pragma once

#include <cstdint>

namespace mixed_attention::cpu::MIXED_ATTENTION_ISA {

class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return result;
  }

 private:
  char* next_;
};

}  // namespace mixed_attention::cpu::MIXED_ATTENTION_ISA
