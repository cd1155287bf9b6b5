#include "cuda/common/device.h"

#include <cuda_runtime_api.h>

#include <atomic>

#include "cuda/common/check.h"

namespace mixed_attention::cuda {
namespace {

constexpr int kMaxDevices = 64;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Reads through a table: 0 = not read yet. Two threads that read at once store the same.
template <class Read>
int cached(std::atomic<int> (&table)[kMaxDevices], int device, Read read) {
  if (device >= kMaxDevices) return read();
  int value = table[device].load(std::memory_order_relaxed);
  if (value == 0) table[device].store(value = read(), std::memory_order_relaxed);
  return value;
}

}  // namespace

int num_multiprocessors(int device) {
  static std::atomic<int> table[kMaxDevices];
  return cached(table, device, [&] { return attribute(cudaDevAttrMultiProcessorCount, device); });
}

int compute_capability(int device) {
  static std::atomic<int> table[kMaxDevices];
  return cached(table, device, [&] {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
           attribute(cudaDevAttrComputeCapabilityMinor, device);
  });
}

}  // namespace mixed_attention::cuda
