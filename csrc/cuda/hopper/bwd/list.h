// The list of a backward's plan that does not fit the parameters of kernels, or that pays: what the device reads.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/plan/key_list.h"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/plan/query_table.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// The host's copy of a list, the same for every batch_head: parts one after the other, as they lie on the device.
struct BwdList {
  std::vector<char> bytes;
  uint64_t id;  // of the table: table_id.h
  int num_units;
  int num_slots;         // that a block needs for its own sums of dq
  int num_shared_tiles;  // query tiles whose sums are shared
  // Where the parts are.
  int64_t units, keys, runs, queries, shared_tiles, first_ranges, ranges;
  // For a kernel that computes dq alone: a list as the forward's, which starts at these.
  int64_t dq_tiles, dq_ranges;
  int num_dq_tiles;

  template <class Part>
  const Part* part(const char* list, int64_t offset) const {
    return reinterpret_cast<const Part*>(list + offset);
  }

  // The list of a launch whose device has it at `list`.
  KeyList key_list(const AttentionParams& params, const char* list, uint32_t* next_item) const;
  WorkTable dq_table(const AttentionParams& params, const char* list) const;
};

// form: kAtomic, where a list has own sums as well, or kSeparate. num_blocks: of the device.
BwdList make_bwd_list(const AttentionParams& params, const std::vector<QueryRun>& runs, DqForm form, int num_blocks);

// True if blocks add up dq by themselves throughout, and have as much to do as several units take.
bool pays_to_list(const BwdList& list, const AttentionParams& params, int num_blocks);

}  // namespace mixed_attention::cuda::hopper
