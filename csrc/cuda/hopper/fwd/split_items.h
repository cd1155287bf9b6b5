// Splitting work items, so that a launch of few or of unevenly many keeps the whole device busy to its end.
#pragma once

#include <cstdint>

#include "cuda/hopper/plan/query_table.h"

namespace mixed_attention::cuda::hopper {

// Splits items of a table of whole ones where the launch then ends clearly earlier: all, the longest ones, or those of
// the last round, which may be a few only. num_blocks: that run at a time.
void split_items(WorkTable& table, int num_blocks);

// The most splits that each of some items can have: as many as one has key tiles, as the blocks rely on a tile in every
// split. begin and end: of whole items.
int most_splits(const WorkTable& table, int begin, int end);

// Splits items of a table of whole ones, most_splits times at most.
void cut_items(WorkTable& table, const ItemSplits& splits);

// About how long a launch takes, in steps of a key tile: in each round of num_blocks items all wait for the longest.
int64_t steps_of_launch(const WorkTable& table, int num_blocks);

// True if splits would save more time than kernels of tangents, which have none here, do over portable ones, which
// have.
bool wants_splits(WorkTable table, int num_blocks);

}  // namespace mixed_attention::cuda::hopper
