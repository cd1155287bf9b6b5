// What the host decides about a launch before it: tiles, how the work is cut, and where scratch lies.
#pragma once

#include <optional>

#include "cuda/common/row_part.h"
#include "cuda/common/row_reference.h"
#include "cuda/common/scratch.h"
#include "cuda/portable/config.h"
#include "cuda/portable/launch.h"
#include "cuda/portable/work_table.h"

namespace mixed_attention::cuda::portable {

// One pass over the tiles: the table as the kernel gets it, and what of it must be brought to the device first.
struct Pass {
  HostWork host;
  WorkTable table;

  Pass(HostWork work, const Tile& tile, int64_t copies, int device, Scratch& scratch);
  unsigned grid(int64_t copies) const;
  Layout layout(const Tile& tile, int64_t copies, int device) const;
};

struct FwdPlan {
  Arithmetic arithmetic;
  int head_dim;  // padded
  Pass pass;
  float* partial_out;  // (num_splits, batch_size, num_heads, seqlen_q, head_dim_v); null without splits
  RowPart* row_parts;  // (num_splits, batch_size, num_heads, seqlen_q)
  size_t workspace_size;
};

struct BwdPlan {
  Arithmetic arithmetic;
  int head_dim;
  bool adds_dq;  // the kernel over keys adds dq up as well; else a kernel over queries computes it
  std::optional<Pass> by_query;
  Pass by_key;
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

}  // namespace mixed_attention::cuda::portable
