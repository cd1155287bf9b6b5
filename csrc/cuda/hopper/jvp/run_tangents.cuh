// What a block of the kernels of tangents does: the roles of its warpgroups, and the walks of its producer.
#pragma once

#include <cstdint>

#include "cuda/hopper/fwd/repair.cuh"
#include "cuda/hopper/jvp/config.h"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/hopper/tile/run_roles.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace mixed_attention::cuda::hopper {

// produce(num_loaded, q_use) brings the tiles of all items, and does so once more where a result has overflowed. The
// rings go on: num_loaded counts key tiles, q_use tiles of queries.
template <template <typename> typename SharedStorage, typename Config, typename Prefetch, typename Produce,
          typename Consume>
__device__ inline void run_tangents(SharedStorage<Config>& shared, const Prefetch& prefetch, const Produce& produce,
                                    const Consume& consume) {
  const auto prepare = [&] {
    constexpr int kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
    prefetch();
    init_pipe(shared.q_pipe, 1, kConsumerWarps);
    init_pipe(shared.k_pipe, 1, kConsumerWarps);
    init_pipe(shared.v_pipe, 1, kConsumerWarps);
    ptx::mbarrier_init(shared.finished, kConsumerWarps);
    shared.has_overflowed = 0;
    ptx::mbarrier_fence_init();
  };
  const auto produce_as_warp = [&](int warp) {
    if (warp != 0 || !ptx::elect_one()) return;
    uint32_t num_loaded = 0;
    RingUse<Config::kQueryBuffers> q_use{0};
    produce(num_loaded, q_use);
    if (must_repair(shared)) produce(num_loaded, q_use);
  };
  run_roles<Config>(prepare, produce_as_warp, consume);
}

}  // namespace mixed_attention::cuda::hopper
