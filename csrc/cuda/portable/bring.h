// Brings the work of a pass to where its kernel reads it.
#pragma once

#include "cuda/common/device_tables.h"
#include "cuda/portable/kernels.h"
#include "cuda/portable/plan.h"
#include "params.h"

namespace mixed_attention::cuda::portable {

// Nobody else overwrites a table on the device before what is enqueued while this lives.
struct Brought {
  GridWork work;
  HeldTable held;
};

// Enqueues what a table too large for the parameters of a kernel needs to be on the device.
Brought bring(const PassOfCall& call, const AttentionParams& params);

}  // namespace mixed_attention::cuda::portable
