// p on its way from the warpgroup that computes it to the one that computes ds: in fp32 and in the order of the
// accumulators, so that each thread reads what its counterpart wrote, 16 bytes at a time.
//
// Two buffers take turns. They lie where the first columns of k and of v were, which both warpgroups have in registers.
// Slabs there that no copy brings do not stay zeros: OwnRows::load reads none of them.
//
// Who signals whom: p_full by one arrival of every warp that writes, p_empty by one of every warp that reads. The first
// p of an item waits for kv_kept beside, one arrival of every consumer warp.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/wide_dk_dv_config.h"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace mixed_attention::cuda::hopper {

using PRing = RingUse<2>;

template <typename Config>
__device__ inline void init_p_barriers(WideDkDvSharedStorage<Config>& shared) {
  init_pipe(shared.p_pipe, kWarpgroup / 32, kWarpgroup / 32);
  ptx::mbarrier_init(shared.kv_kept, Config::kConsumers * kWarpgroup / 32);
}

// This thread's p in its buffer, by the number of the accumulator.
class OwnP {
 public:
  template <typename Config>
  __device__ OwnP(WideDkDvSharedStorage<Config>& shared, PRing use)
      : fours_(reinterpret_cast<float4*>(use.stage() == 0 ? shared.k : shared.v) + threadIdx.x % kWarpgroup) {}

  template <int kCount>
  __device__ void store(const float (&p)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) fours_[i / 4 * kWarpgroup] = make_float4(p[i], p[i + 1], p[i + 2], p[i + 3]);
  }

  __device__ float operator[](int i) const {
    const float4 four = fours_[i / 4 * kWarpgroup];
    return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
  }

 private:
  float4* fours_;
};

}  // namespace mixed_attention::cuda::hopper
