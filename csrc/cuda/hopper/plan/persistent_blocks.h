// How many blocks a persistent kernel gets.
#pragma once

#include <algorithm>

#include "cuda/common/device.h"

namespace mixed_attention::cuda::hopper {

// As many as run at a time, `blocks` on a multiprocessor, fewer where there are fewer items. `sharers` blocks in a row
// share an item.
inline int num_persistent_blocks(int num_items, int device, int sharers = 1, int blocks = 1) {
  return std::min(num_items, num_multiprocessors(device) * blocks / sharers) * sharers;
}

}  // namespace mixed_attention::cuda::hopper
