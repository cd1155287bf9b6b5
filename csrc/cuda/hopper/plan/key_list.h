// Plans of many segments, which do not fit the parameters of a kernel, as the backward reads them in device memory: key
// tiles by units, who reads them, and the tiles of all queries.
//
// A unit is the work that a block takes up at once. Most are a single key tile. Those of a few hundred rows that see
// each other and nobody else are one unit: its block adds up dq of its query tiles by itself, in memory of its own that
// stays in the L2 cache, and writes it at the last visit, in 16 bits. What others would cost is spared: sums of fp32
// for all queries, that begin with zeros, to which blocks add, and that are rounded in the end.
//
// Device side: bwd/listed_walk.cuh.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda::hopper {

// A tile of keys of the list.
struct alignas(16) ListedKeys {
  int row_begin, row_end;      // with the segment
  int first_run;               // in KeyList::runs, those who read it
  int num_tiles;               // query tiles; without any the gradients are zero
  int first_query, end_query;  // those are tiles of all queries between these
  int is_first, is_last;       // among the tiles of its segment
};

// Whose sums of dq a visit adds to. Own ones lie in the slot of a query tile among those of the unit; they begin with
// the first visit and are done with the last one. Others lie among those that blocks share.
struct SumsOfRun {
  int word;

  static constexpr SumsOfRun own(int first_slot, bool begins, bool ends) {
    return {first_slot << 2 | int{ends} << 1 | int{begins}};
  }
  static constexpr SumsOfRun shared(int first_tile) { return {~first_tile}; }

  constexpr bool are_shared() const { return word < 0; }
  constexpr int first_shared() const { return ~word; }
  constexpr int first_slot() const { return word >> 2; }
  // True if sums begin with visits of the first tile of the key segment, and end with those of the last one.
  constexpr bool begin() const { return (word & 1) != 0; }
  constexpr bool end() const { return (word & 2) != 0; }
};

// Query rows that read a key segment, as tiles of kQueryTileRows rows.
struct alignas(16) ListedRun {
  int row_begin, row_end;
  int first_tile;  // among those of all queries
  SumsOfRun sums;
};

// A tile of queries.
struct alignas(16) ListedQueries {
  int row_begin, row_end;  // with the segment
  int segment;
  int is_unread;  // whether no key tile visits it, so that its dq has to be set to zero
};

// Rows of a key range.
struct ListedRange {
  int begin, end;
};

struct KeyList {
  int num_items, num_heads;  // an item is a unit for one batch_head, and those of a unit follow one another
  int num_batch_heads;
  const int* units;        // (units + 1), where the tiles of each begin, and where those of the last one end
  const ListedKeys* keys;  // (tiles of all units)
  const ListedRun* runs;   // those of one tile after those of another
  uint32_t* next_item;     // the items that blocks have taken beside their first one; begins with zero
};

}  // namespace mixed_attention::cuda::hopper
