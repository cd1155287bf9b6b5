// What passes through shared memory in a kernel that goes through a list of keys, beside tiles.
#pragma once

#include <cstdint>

#include "cuda/hopper/tile/pipe.h"

namespace mixed_attention::cuda::hopper {

// A tile of keys that a block works on, of one batch_head.
struct alignas(16) ListedItem {
  int row_begin, row_end;  // with the segment
  int head, batch;
  int num_tiles;  // query tiles; -1: there are no more items
  int first_run;  // in KeyList::runs, those who read it
  enum : int { kIsFirst = 1, kIsLast = 2, kIsRare = 4 };
  int flags;  // whether it is the first or the last tile of its segment; whether it is a rare item (rare_items.cuh)

  constexpr bool is_first() const { return (flags & kIsFirst) != 0; }
  constexpr bool is_last() const { return (flags & kIsLast) != 0; }
  constexpr bool is_rare() const { return (flags & kIsRare) != 0; }
};

// One that is worked on, one whose tiles are on their way, and two more.
inline constexpr int kItemStages = 4;

struct ItemRing {
  ListedItem items[kItemStages];
  Pipe<kItemStages> pipe;
};

// A visit of a query tile, and what becomes of the dq that it computes.
struct alignas(16) DqVisit {
  int row_begin, num_rows;
  int place;  // of the tile's sums: a slot of the block, or among those that blocks share, of one batch_head
  enum : int { kShares = 1, kBegins = 2, kEnds = 4 };
  int flags;

  constexpr bool shares() const { return (flags & kShares) != 0; }
  constexpr bool begins() const { return (flags & kBegins) != 0; }
  constexpr bool ends() const { return (flags & kEnds) != 0; }
};

// The producer is at most this many visits ahead of the warpgroup that computes dq: queries have five buffers, of which
// the next one is filled when consumers have left the first; then they have handed over ds of the visit before, of
// which there are two buffers.
inline constexpr int kDqVisits = 16;

struct DqVisitRing {
  DqVisit visits[kDqVisits];
  uint64_t full[kDqVisits];
};

}  // namespace mixed_attention::cuda::hopper
