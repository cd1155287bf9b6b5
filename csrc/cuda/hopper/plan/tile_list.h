// Plans of many segments, which do not fit the parameters of a kernel: the tiles of queries one by one, in device
// memory.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/hopper/plan/query_table.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// The host's copy of a list, the same for every batch_head. Longest tiles come first, those without keys last.
struct HostTileList {
  std::vector<ListedTile> tiles;
  std::vector<KeyTiles> ranges;
  uint64_t id;  // of its table: table_id.h

  int64_t tile_bytes() const;  // a multiple of 256; the ranges lie behind
  int64_t device_bytes() const;

  // The table of a launch, which says where the list lies once that is there.
  WorkTable table(const AttentionParams& params) const;
};

HostTileList make_tile_list(const AttentionParams& params, int block_m, int block_n);

}  // namespace mixed_attention::cuda::hopper
