// Brings a list of tiles to where a kernel reads it.
#pragma once

#include "cuda/common/device_tables.h"
#include "cuda/hopper/plan/tile_list.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// Says in the table where the list lies, and enqueues what it needs to be there. room: of the call's workspace, for
// want of a place where it is kept. Nobody writes over the list before what is enqueued while the result lives.
HeldTable bring_list(const HostTileList& list, const AttentionParams& params, char* room, WorkTable& table);

}  // namespace mixed_attention::cuda::hopper
