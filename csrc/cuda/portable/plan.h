// What the host decides about a launch before it: tiles, how the work is cut, and where scratch lies.
#pragma once

#include <cstdint>
#include <memory>

#include "cuda/common/row_part.h"
#include "cuda/common/row_reference.h"
#include "cuda/common/scratch.h"
#include "cuda/portable/config.h"
#include "cuda/portable/launch.h"
#include "cuda/portable/work_table.h"

namespace mixed_attention::cuda::portable {

// One pass over the tiles, which is the same for every call of a plan with as many heads and sequences on a device.
struct Pass {
  HostWork host;
  int num_splits;  // WorkTable
  uint64_t id;     // no other pass of this process has it

  unsigned grid(int64_t copies) const;
  Layout layout(const Tile& tile, int64_t copies, int device) const;
};

// A pass as a call gets it: kept from an earlier one, or new.
struct PassOfCall {
  std::shared_ptr<const Pass> pass;
  // Room in the workspace for calls of which no table is kept on the device (device_tables.h); null where the
  // parameters of kernels hold it.
  char* table = nullptr;

  // Takes the room.
  void take(Scratch& scratch);
};

// What is decided once a call, and, below, where its parts of the workspace lie.
struct FwdPlan {
  Arithmetic arithmetic;
  int head_dim;  // padded
  PassOfCall by_query;
  float* partial_out;  // (num_splits, batch_size, num_heads, seqlen_q, head_dim_v); null without splits
  RowPart* row_parts;  // (num_splits, batch_size, num_heads, seqlen_q)
  size_t workspace_size;
};

struct BwdPlan {
  Arithmetic arithmetic;
  int head_dim;
  bool adds_dq;         // the kernel over keys adds dq up as well; else a kernel over queries computes it
  PassOfCall by_query;  // none where adds_dq
  PassOfCall by_key;
  float* lse_log2;                 // (batch_size, num_heads, seqlen_q); +inf for rows without keys
  float* delta;                    // likewise
  RowReference* references;        // likewise
  int* has_references;             // one word, 0 where no row has one; zeros from here on to the end of dq_sum
  float* dq_sum;                   // DqSum; null unless adds_dq
  int dq_sum_cols;                 // head_dim of the problem, rounded up to a multiple of 8
  int64_t dq_sum_size;             // in numbers
  float* partial_dq;               // (num_splits, batch_size, num_heads, seqlen_q, head_dim); null without splits
  float *partial_dk, *partial_dv;  // (num_splits, batch_size, num_heads, seqlen_k, head_dim or head_dim_v)
  size_t workspace_size;
};

// Both read params.workspace alone of the pointers: null gives a plan of the same sizes.
FwdPlan plan_fwd(const FwdParams& params);
BwdPlan plan_bwd(const BwdParams& params);

// Say where in params.workspace the parts of a plan lie, once that is there.
void take_workspace(const FwdParams& params, FwdPlan& plan);
void take_workspace(const BwdParams& params, BwdPlan& plan);

}  // namespace mixed_attention::cuda::portable
