// How the blocks of a forward kernel go through their work items.
#pragma once

#include <type_traits>

#include "cuda/hopper/plan/work_items.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
using Walk = std::conditional_t<Config::kIsListed, ListWalk<Config::kBlockM>, ItemWalk<Config::kBlockM>>;

}  // namespace mixed_attention::cuda::hopper
