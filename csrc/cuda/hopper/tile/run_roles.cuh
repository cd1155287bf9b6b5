// The entry of the persistent kernels: barriers and tensor maps while the grid before ends, then a role for every
// warpgroup. The first one produces, the next ones consume.
#pragma once

#include "cuda/hopper/config.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/dependent_grids.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

namespace mixed_attention::cuda::hopper {

// A __syncthreads of the whole cluster, or of the block where that is alone.
template <int kClusterBlocks>
__device__ inline void sync_blocks() {
  if constexpr (kClusterBlocks > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }
}

// prepare() initialises by one thread; produce(warp) is called by the first warpgroup, consume(number) by kConsumers
// others and add(), if there is any, by the one behind them, which gives registers away and has kDqRegisters.
template <typename Config, int kClusterBlocks = 1, typename Prepare, typename Produce, typename Consume,
          typename... Add>
__device__ inline void run_roles(const Prepare& prepare, const Produce& produce, const Consume& consume,
                                 const Add&... add) {
  // Barriers and tensor maps
  if (threadIdx.x == 0) prepare();
  ptx::allow_next_grid();
  sync_blocks<kClusterBlocks>();
  ptx::wait_for_grids_before();

  // Roles
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    ptx::release_registers<Config::kProducerRegisters>();
    produce(static_cast<int>(threadIdx.x / 32));
  } else if (sizeof...(Add) == 0 || warpgroup <= Config::kConsumers) {
    ptx::acquire_registers<Config::kConsumerRegisters>();
    consume(warpgroup - 1);
  } else if constexpr (sizeof...(Add) > 0) {
    ptx::release_registers<Config::kDqRegisters>();
    (add(), ...);
  }
  // Shared memory stays until the peer is done.
  if constexpr (kClusterBlocks > 1) ptx::cluster_sync();
}

}  // namespace mixed_attention::cuda::hopper
