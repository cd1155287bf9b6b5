// A consumer's MMAs of the kernels for gradients of tangents, with their operands and accumulators in registers.
//
// What is not there is zeros in shared memory, written once. As zero times infinity is not zero, a product of scores
// with such a tile takes zeros for its other side as well.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd_jvp/config.h"
#include "cuda/hopper/bwd_jvp/items.cuh"
#include "cuda/hopper/bwd_jvp/params.h"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/register_operand.cuh"
#include "cuda/ptx/keep.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// A consumer's own rows of a tensor as an operand: in registers, or where they lie.
template <typename Element, bool kIsKept>
struct OwnOperand {
  uint32_t words[kIsKept ? kJvpHeadDim / 4 : 1];

  // first_row: of this warp in the tile.
  __device__ void load(const Element* tile, int first_row) {
    const auto has_slab = [](int) { return true; };
    if constexpr (kIsKept) load_row_operand<kRowBytes, 0>(words, tile, first_row, has_slab);
  }

  // rows: where they lie.
  template <int kCount>
  __device__ void multiply(float (&d)[kCount], ptx::Operand rows, ptx::Operand streamed, bool overwrites) const {
    if constexpr (kIsKept) {
      add_row_mma<Element, 0>(d, words, streamed, overwrites);
    } else {
      add_row_mma<Element, kJvpHeadDim, 0, 0>(d, rows, streamed, overwrites);
    }
  }

  // Overwrites d and e by the products with a tile and with the one behind it.
  template <int kCount>
  __device__ void multiply_pair(float (&d)[kCount], float (&e)[kCount], ptx::Operand rows,
                                ptx::Operand streamed) const {
    static_assert(!kIsKept, "beside the results of two tiles there are no registers for rows");
#pragma unroll
    for (int step = 0; step < kJvpHeadDim / 16; ++step) {
      ptx::WgmmaPair<Element, 2 * kCount>::ss(d, e, rows.advance(step * kColumnStepBytes).descriptor(),
                                              streamed.advance(step * kColumnStepBytes).descriptor(), step > 0);
    }
  }
};

template <typename Config>
struct SideMma {
  using Element = typename Config::Element;
  using Operand = ptx::Operand;
  static constexpr int kTile = Config::kStepRows / 2;

  const BwdJvpKernelParams<Config>& params;
  Operand owned_side, streamed_ring;
  OwnOperand<Element, Config::kKeepsFirst> own_first;
  OwnOperand<Element, Config::kKeepsSecond> own_second;
  OwnOperand<Element, Config::kKeepsThird> own_third;

  float s[kTile], z[kTile], e[kTile], x[kTile];  // products, then p, p h, g and ds
  uint32_t ds[kTile / 2], g[kTile / 2], ph[kTile / 2], p[kTile / 2];
  float first[Config::kHeadDim / 2], second[Config::kHeadDim / 2];  // dq and dq', or dk and dv

  __device__ SideMma(const BwdJvpKernelParams<Config>& params, BwdJvpSharedStorage<Config>& shared, int consumer)
      : params(params),
        owned_side(Operand::make(shared.owned).advance(consumer * kWarpgroupRows * kRowBytes)),
        streamed_ring(Operand::make(shared.streamed)) {}

  // Loads what stays in registers; first_row: of this warp in the tile.
  __device__ void load(const BwdJvpSharedStorage<Config>& shared, int first_row) {
    own_first.load(shared.owned[0], first_row);
    if constexpr (Config::kOwnsSecond) own_second.load(shared.owned[1], first_row);
    own_third.load(shared.owned[2 / Config::kOwnedStep], first_row);
  }

  // One batch: s, and z if it is joined.
  __device__ void issue_scores(Step<Config> step) {
    if constexpr (Config::kJoinsScores) {
      own_first.multiply_pair(s, z, owned(0), streamed(step, 0));
    } else {
      own_first.multiply(s, owned(0), streamed(step, 0), true);
    }
    ptx::wgmma_commit();
  }

  template <int kPending>
  __device__ void wait_for_scores() {
    if constexpr (Config::kJoinsScores) {
      ptx::wgmma_wait<kPending>(s, z);
    } else {
      ptx::wgmma_wait<kPending>(s);
    }
  }

  // One batch: e, x, and z unless it is joined.
  __device__ void issue_tangents(Step<Config> step) {
    if constexpr (Config::kJoinsScores) {
    } else if constexpr (Config::kOwnsSecond && Config::kStreamsSecond) {
      own_second.multiply(z, owned(1), streamed(step, params.owned[1].exists ? 0 : 1), true);
      multiply_shared(z, owned(params.streamed[1].exists ? 0 : 1), streamed(step, 1));
    } else if constexpr (Config::kOwnsSecond) {
      own_second.multiply(z, owned(1), streamed(step, 0), true);
    } else {
      own_first.multiply(z, owned(0), streamed(step, 1), true);
    }
    own_third.multiply(e, owned(2), streamed(step, 2), true);
    if constexpr (Config::kOwnsFourth && Config::kStreamsFourth) {
      OwnOperand<Element, false>{}.multiply(x, owned(3), streamed(step, params.owned[3].exists ? 2 : 3), true);
      multiply_shared(x, owned(params.streamed[3].exists ? 2 : 3), streamed(step, 3));
    } else if constexpr (Config::kOwnsFourth) {
      OwnOperand<Element, false>{}.multiply(x, owned(3), streamed(step, 2), true);
    } else if constexpr (Config::kStreamsFourth) {
      own_third.multiply(x, owned(2), streamed(step, 3), true);
    }
    ptx::wgmma_commit();
  }

  __device__ void wait_for_tangents() {
    if constexpr (Config::kHasFourth) {
      ptx::wgmma_wait<0>(z, e, x);
    } else {
      ptx::wgmma_wait<0>(z, e);
    }
  }

  // Makes operands of p, p h, g and ds.
  __device__ void take_operands() {
    if constexpr (Config::kOwnsKeys) round_operand<Element>(ph, z);
    if constexpr (Config::kStreamsFourth && Config::kOwnsKeys) round_operand<Element>(p, s);
    round_operand<Element>(ds, x);
    round_operand<Element>(g, e);
  }

  // One batch: what a tile adds to the gradients.
  __device__ void issue_gradients(Step<Config> step) {
    add_column_mma<Element>(first, ds, streamed(step, 0), false);
    if constexpr (Config::kStreamsSecond) add_column_mma<Element>(first, g, streamed(step, 1), false);
    if constexpr (Config::kOwnsKeys) {
      add_column_mma<Element>(second, ph, streamed(step, 2), false);
      if constexpr (Config::kStreamsFourth) add_column_mma<Element>(second, p, streamed(step, 3), false);
    } else if constexpr (Config::kHasSecondGradient) {
      add_column_mma<Element>(second, g, streamed(step, 0), false);
    }
    ptx::wgmma_commit();
  }

  template <int kPending>
  __device__ void wait_for_gradients() {
    if constexpr (Config::kHasSecondGradient) {
      ptx::wgmma_wait<kPending>(first, second);
    } else {
      ptx::wgmma_wait<kPending>(first);
    }
  }

 private:
  // Computed anew in every step: the compiler would hold all of them.
  __device__ Operand owned(int i) const {
    return Operand{ptx::keep(owned_side.low)}.advance(i / Config::kOwnedStep * Config::kTileBytesM);
  }
  __device__ Operand streamed(Step<Config> step, int i) const {
    return streamed_ring.advance((step.use().stage() * Config::kStreamedTensors + i) * Config::kTileBytesN +
                                 step.first_row() * kRowBytes);
  }

  __device__ static void multiply_shared(float (&d)[kTile], Operand a, Operand b) {
    add_row_mma<Element, kJvpHeadDim, 0, 0>(d, a, b, false);
  }
};

}  // namespace mixed_attention::cuda::hopper
