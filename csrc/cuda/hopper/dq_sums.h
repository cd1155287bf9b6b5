// Where the kernel that computes all gradients adds up dq.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::hopper {

// Query tile by query tile: (batch_size, num_heads, num_tiles, kQueryTileRows * head_dim of the kernel), each in the
// order of the accumulators. Either the tiles of all queries, to which blocks add as they come; or, key segment by key
// segment, the tiles of those who read it, to which its blocks add in turn.
struct DqSums {
  float* sums;      // null where another kernel computes dq; begin with zero, but where there are turns
  uint32_t* turns;  // (batch_size, num_heads, num_tiles), additions so far; begin with zero
  int num_tiles;
};

// Query tiles in a row whose sums lie in a row.
struct DqSumsRun {
  int first_tile, num_tiles;
  int first_sum;  // where the first one's sums are among the tiles of DqSums
};

}  // namespace mixed_attention::cuda::hopper
