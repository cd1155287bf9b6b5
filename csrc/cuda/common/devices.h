// A set of devices that threads may add to and ask at the same time.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda {

class Devices {
 public:
  bool contains(int device) const;
  void add(int device);  // those beyond the sixty-fourth are never in it

 private:
  alignas(8) mutable uint64_t bits_ = 0;  // by device
};

}  // namespace mixed_attention::cuda
