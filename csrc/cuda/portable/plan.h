// What the host decides about a launch before it: tiles, how the work is cut, and where scratch lies.
#pragma once

#include <cstdint>
#include <memory>

#include "cuda/common/scratch.h"
#include "cuda/portable/config.h"
#include "cuda/portable/kernels.h"
#include "cuda/portable/work_table.h"
#include "cuda/problem.h"

namespace mixed_attention::cuda::portable {

// One pass over the tiles, which is the same for every call of a plan with as many heads and sequences on a device.
struct Pass {
  HostWork host;
  int num_splits;  // DeviceWork
  uint64_t id;     // of its table: table_id.h

  unsigned grid(int64_t num_batch_heads) const;
  Layout layout(const Tile& tile, int64_t num_batch_heads, int device) const;
};

enum class Side { kQueries, kKeys };

// The pass of a call: made once, as to go through the segments of thousands of groups takes the host longer than all
// else in a call.
std::shared_ptr<const Pass> pass_of(Side side, const AttentionParams& params, const Tile& tile, bool may_split = true);

Arithmetic arithmetic_of(const AttentionParams& params);

// A pass as a call gets it: kept from an earlier one, or new.
struct PassOfCall {
  std::shared_ptr<const Pass> pass;
  // Room in the workspace for calls of which no table is kept on the device (device_tables.h); null where the
  // parameters of kernels hold it.
  char* table = nullptr;

  // Takes the room.
  void take(Scratch& scratch);
  // Takes room for so many numbers of every split; null where there is one.
  float* take_splits(Scratch& scratch, int64_t count) const;
};

// Takes room for what rows of queries have, and for splits of dk and dv.
void take_rows(const BwdParams& params, Scratch& scratch, BwdBuffers& buffers);
void take_splits_of_keys(const BwdParams& params, const PassOfCall& by_key, Scratch& scratch, BwdBuffers& buffers);

// The passes of a call, what else is decided of it once, and, in buffers, where all of it lies in the workspace.
struct FwdPasses {
  Arithmetic arithmetic;
  int head_dim;  // padded
  PassOfCall by_query;
  FwdBuffers buffers;
  size_t workspace_size;
};

struct BwdPasses {
  Arithmetic arithmetic;
  int head_dim;
  bool adds_dq;         // the kernel over keys adds dq up as well; else a kernel over queries computes it
  PassOfCall by_query;  // none where adds_dq
  PassOfCall by_key;
  BwdBuffers buffers;
  size_t workspace_size;
};

// Both read params.workspace alone of the pointers: null gives a plan of the same sizes.
FwdPasses plan_fwd(const FwdParams& params);
BwdPasses plan_bwd(const BwdParams& params);

// Say where in params.workspace all of a plan lies, once that is there.
void take_workspace(const FwdParams& params, FwdPasses& plan);
void take_workspace(const BwdParams& params, BwdPasses& plan);

}  // namespace mixed_attention::cuda::portable
