// The key ranges of a query segment as tiles.
#pragma once

#include "cuda/hopper/plan/query_table.h"
#include "params.h"
#include "schedule.h"

namespace mixed_attention::cuda::hopper {

struct SegmentKeyTiles {
  int num_ranges;              // of some keys
  int num_partial, num_tiles;  // key tiles: partial ones, and all
};

// Writes the ranges of some keys, those with a partial tile first, as only these are masked. There is room for all.
SegmentKeyTiles make_key_tiles(const QuerySegment& segment, int block_n, KeyTiles* ranges);

// True if the key tiles of a segment, and the items of a launch, are counted in 32 bits.
bool are_counted_in_32_bits(const AttentionParams& params);

}  // namespace mixed_attention::cuda::hopper
