// Tiles of the Hopper kernels, for people to read.
#pragma once

#include "ceil_div.h"
#include "cuda/common/device.h"
#include "cuda/launch.h"

namespace mixed_attention::cuda::hopper {

// One thread block to a multiprocessor, and tiles that are not cut. segments: of the schedule, whose rows tiles own.
template <class Segments>
Layout layout_of(const AttentionParams& params, const Segments& segments, int tile_rows, int block_rows) {
  int64_t num_tiles = 0;
  for (const auto& segment : segments) num_tiles += ceil_div(segment.rows.size(), tile_rows);
  num_tiles *= params.batch_size * params.num_heads;
  return {tile_rows, block_rows, 1, num_tiles, num_multiprocessors(params.device), 0};
}

}  // namespace mixed_attention::cuda::hopper
