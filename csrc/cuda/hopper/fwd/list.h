// What the host alone knows of a forward's plan: whether there is one, and the list that the device gets.
#pragma once

#include <memory>

#include "cuda/hopper/plan/tile_list.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// Why there is no plan of a call, whose tensors these kernels can read; null where there is one.
const char* refusal_of_plan(const FwdParams& params);

// The list of a call whose plan has one.
std::shared_ptr<const HostTileList> list_of(const FwdParams& params);

}  // namespace mixed_attention::cuda::hopper
