// The memory in which the kernel that computes all gradients adds up dq.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::hopper {

// Query tile by query tile: (batch_size, num_heads, num_tiles, kQueryTileRows * head_dim of the kernel), each in the
// order of the accumulators, of one share of a call at a time (bwd/plan.h). Either the tiles of all queries, to which
// blocks add as they come; or, key segment by key segment, the tiles of those who read it, to which its blocks add in
// turn. The first num_spare of all tiles lie in memory that the call finds spare (BwdParams::spare_out). Tiles begin
// with zero unless dq is ordered.
struct DqAccum {
  float* spare;                   // (num_spare, kQueryTileRows * head_dim of the kernel)
  float* others;                  // (num_others, kQueryTileRows * head_dim of the kernel)
  int64_t num_spare, num_others;  // none where another kernel computes dq
  uint32_t* turns;                // (batch_size, num_heads, num_tiles), additions so far; begin with zero
  int num_tiles;

  constexpr float* of_tile(int64_t tile, int64_t tile_floats) const {
    return tile < num_spare ? spare + tile * tile_floats : others + (tile - num_spare) * tile_floats;
  }
};

// Query tiles in a row whose sums lie in a row.
struct DqAccumRun {
  int first_tile, num_tiles;
  int first_accum;  // where the first one's sums are among the tiles of DqAccum
};

}  // namespace mixed_attention::cuda::hopper
