// The barriers of buffers in shared memory, as any compiler reads them; tile/ring.cuh is what kernels do with them.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::hopper {

// Those of a ring, stage by stage: full once a buffer's tile is there, empty once nobody reads it any more.
template <int kStages>
struct Pipe {
  uint64_t full[kStages], empty[kStages];
};

// Those of a single buffer.
struct SingleBufferPipe {
  uint64_t full, empty;
};

}  // namespace mixed_attention::cuda::hopper
