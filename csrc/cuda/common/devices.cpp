#include "cuda/common/devices.h"

#include <atomic>

namespace mixed_attention::cuda {
namespace {

uint64_t bit_of(int device) { return device < 64 ? uint64_t{1} << device : 0; }

}  // namespace

bool Devices::contains(int device) const {
  return std::atomic_ref(bits_).load(std::memory_order_relaxed) & bit_of(device);
}

void Devices::add(int device) { std::atomic_ref(bits_).fetch_or(bit_of(device), std::memory_order_relaxed); }

}  // namespace mixed_attention::cuda
