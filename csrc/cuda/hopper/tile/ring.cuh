// Which buffer of a ring a tile goes through, and which phases of its barriers that use waits for.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::hopper {

// A use of a ring of buffers, counted from the start of the block.
template <int kStages>
struct RingUse {
  uint32_t count;

  __device__ int stage() const { return count % kStages; }
  __device__ uint32_t full_parity() const { return count / kStages % 2; }
  __device__ uint32_t empty_parity() const { return full_parity() ^ 1; }
};

}  // namespace mixed_attention::cuda::hopper
