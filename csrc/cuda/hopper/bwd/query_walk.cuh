// The walk of a block over the query tiles of a work item, all or half of them, and its turns to add to their dq_accum.
//
// If dq is ordered, the items of one round, key segment and batch_head start kTilesApart tiles apart and go around, so
// that blocks come to a query tile one after the other. That is the order of its turns: by round, then by step of the
// walk, where these are equal by falling number of the item. As every block adds in this order of all additions, too,
// and waits for earlier ones only, no blocks wait in a circle, given that all of them are on the device.
#pragma once

#include "cuda/hopper/bwd/query_tiles.cuh"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/plan/work_items.cuh"

namespace mixed_attention::cuda::hopper {

// The query tiles of a key segment that this block goes through.
template <typename Config>
struct QueryShare {
  int first, count;

  __device__ explicit QueryShare(const KeySegmentTiles& segment)
      : first(segment.num_tiles * block_rank() / Config::kSplits),
        count(segment.num_tiles * (block_rank() + 1) / Config::kSplits - first) {}

  __device__ static int block_rank() { return blockIdx.x % Config::kSplits; }
};

// The items of this block, tiles of keys; the blocks of a cluster share theirs.
template <typename Config>
using KeyItems = WorkItems<Config::kBlockN, KeyWorkTable, Config::kSplits>;

// Steps until the next block may add: about two microseconds. So few that the tiles that all blocks of the device are
// at stay in the L2 cache.
constexpr int kTilesApart = 3;

// The items of a round, key segment and batch_head, and which of them an item is. Tiles are counted within the share of
// the key segment's query tiles that the block goes through.
template <typename Config>
struct RoundOfItems {
  int number, count;
  int first_turn;  // of theirs at any tile: those before were of earlier rounds
  int arc;         // number of leading tiles over which their starting points are spread

  __device__ RoundOfItems(const KeyItems<Config>& item, int num_tiles) {
    const KeySegmentTiles& segment = item.tiles();
    const int num_blocks = gridDim.x / Config::kSplits;
    const int block = item.item % num_blocks;
    const int key_tile = (item.row_begin - segment.row_begin) / Config::kBlockN;
    const int num_key_tiles = (segment.row_end - segment.row_begin + Config::kBlockN - 1) / Config::kBlockN;
    number = min(key_tile, block);
    count = number + min(num_key_tiles - key_tile, num_blocks - block);
    first_turn = key_tile - number;
    arc = min(num_tiles, count * kTilesApart);
  }

  __device__ int start() const { return number * arc / count; }

  // How many additions to this tile come before the item's own.
  __device__ int turn(int tile) const {
    // The last of those that start there or before it arrives first, those that start behind it come last.
    const int first = (tile < arc ? ((tile + 1) * count + arc - 1) / arc : count) - 1;
    return first_turn + first - number + (first < number ? count : 0);
  }
};

// The walk over the query tiles of an item that has any.
template <typename Config>
class QueryWalk {
 public:
  __device__ QueryWalk(const KeyWorkTable& table, const KeyItems<Config>& item)
      : segment_(item.tiles()),
        share_(segment_),
        items_(item, share_.count),
        position_(share_.first + (Config::kIsOrdered ? items_.start() : 0) - 1),
        queries_(table, segment_, position_ + 1) {}

  __device__ int num_tiles() const { return share_.count; }

  __device__ QueryTile next() {
    if (++position_ == share_.first + share_.count) {
      position_ = share_.first;
      queries_.seek(segment_, position_);
    }
    return queries_.next();
  }

  // The place of the tile that next() gave among those of all key segments, and its turn if dq is ordered.
  __device__ int place() const { return segment_.first_tile + position_; }
  __device__ int turn() const { return items_.turn(position_ - share_.first); }

 private:
  const KeySegmentTiles& segment_;
  QueryShare<Config> share_;
  RoundOfItems<Config> items_;
  int position_;  // of the current tile, among the segment's
  QueryTileIterator queries_;
};

}  // namespace mixed_attention::cuda::hopper
