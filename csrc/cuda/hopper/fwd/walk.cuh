// How the blocks of a forward kernel, or the teams of a block, go through their work items.
#pragma once

#include <type_traits>

#include "cuda/hopper/plan/work_items.cuh"

namespace mixed_attention::cuda::hopper {

// The consumers'.
template <typename Config>
using Walk =
    std::conditional_t<Config::kIsListed, WarpListWalk<Config::kBlockM, Config::kTeams>, ItemWalk<Config::kBlockM>>;

// The producer's, which is a thread by itself.
template <typename Config>
using LeanWalk = std::conditional_t<Config::kIsListed, LeanListWalk<Config::kBlockM, Config::kTeams>, Walk<Config>>;

template <typename Walk>
__device__ inline Walk walk_of_team(const WorkTable& table, [[maybe_unused]] int team) {
  if constexpr (requires { Walk(table, team); }) {
    return Walk(table, team);
  } else {
    return Walk(table);
  }
}

}  // namespace mixed_attention::cuda::hopper
