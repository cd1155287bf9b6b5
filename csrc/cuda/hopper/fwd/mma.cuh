// A consumer's MMAs of the forward, with their operands and accumulators in registers: scores s, p, output o. Numbers
// of 16 bits are factors themselves; those of fp32 are made up of fp16 ones times the row_scale of their row
// (half_limbs.h).
#pragma once

#include <cstdint>

#include "cuda/hopper/config.h"
#include "cuda/hopper/fwd/epilogue.cuh"
#include "cuda/hopper/fwd/params.h"
#include "cuda/hopper/fwd/softmax.cuh"
#include "cuda/hopper/fwd/tile_row_scales.cuh"
#include "cuda/hopper/fwd/walk.cuh"
#include "cuda/hopper/mask/key_bits.cuh"
#include "cuda/hopper/split_fp16/half_mma.cuh"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

// The tiles that a consumer multiplies, by the stages of their rings.
template <typename Config>
struct FwdOperands {
  using Operand = ptx::SlabOperand<Config::kRowBytes>;

  Operand q_ring, k_ring, v_ring;

  __device__ FwdOperands(FwdSharedStorage<Config>& shared, int consumer)
      : q_ring(Operand::make(shared.q).advance(consumer * kWarpgroupRows * Config::kRowBytes)),
        k_ring(Operand::make(shared.k)),
        v_ring(Operand::make(shared.v, Config::kSlabBytesN)) {}

  __device__ Operand q(int stage) const { return q_ring.advance(stage * Config::kTileBytesM); }
  __device__ Operand k(int stage) const { return k_ring.advance(stage * Config::kTileBytesN); }
  __device__ Operand v(int stage) const { return v_ring.advance(stage * Config::kTileBytesN); }
};

// In 16 bits the output is summed up in the tensor cores. Both forms have the same steps, in the order in which a tile
// takes them; start_item comes before an item's first.
template <typename Config>
struct FwdMma {
  using Element = typename Config::Element;
  using Ring = RingUse<Config::kStages>;

  FwdOperands<Config> operands;
  float scale_log2[2];  // of the thread's two rows
  float s[Config::kBlockN / 2];
  uint32_t p[Config::kBlockN / 4];
  float o[Config::kHeadDim / 2];

  __device__ FwdMma(const FwdKernelParams& params, FwdSharedStorage<Config>& shared, int consumer)
      : operands(shared, consumer), scale_log2{params.softmax_scale_log2, params.softmax_scale_log2} {}

  __device__ void start_item(const FwdKernelParams&, const ItemRows&, int) {}

  __device__ void issue_s(int q_stage, int k_stage) {
    issue_row_mma<Element, Config::kHeadDim, Config::kSlabBytesM, Config::kSlabBytesN>(s, operands.q(q_stage),
                                                                                       operands.k(k_stage));
  }

  __device__ void issue_o(int v_stage) { issue_column_mma<Element>(o, p, operands.v(v_stage)); }

  // Finishes s behind its MMA; use is that of the tile of keys.
  __device__ void finish_s(FwdSharedStorage<Config>&, Ring) {}

  // Waits for both MMAs.
  __device__ void wait() { ptx::wgmma_wait<0>(o, s); }

  // Makes factors of p, which has taken the place of s.
  __device__ void take_p(FwdSharedStorage<Config>&, Ring) { round_operand<Element>(p, s); }
};

// In fp32 what a tile adds to the output is a sum of its own, in the row_scale of the tile's largest value. It is added
// up outside the tensor cores, because these cut sums off and additions round.
template <typename Config>
  requires(Config::kHasRowScales)
struct FwdMma<Config> {
  using Factor = typename Config::Factor;
  using Ring = RingUse<Config::kStages>;

  FwdOperands<Config> operands;
  float scale_log2[2];  // of the thread's two rows, with the row_scales of q
  float s[Config::kBlockN / 2];
  HalfOperand<Config::kLimbs, Config::kBlockN / 4> p;
  float o[Config::kHeadDim / 2], tile_o[Config::kHeadDim / 2];
  float v_scale;  // of the tile that p is of

  __device__ FwdMma(const FwdKernelParams&, FwdSharedStorage<Config>& shared, int consumer)
      : operands(shared, consumer) {}

  // first_row: of this warp in the tile.
  __device__ void start_item(const FwdKernelParams& params, const ItemRows& rows, int first_row) {
    const float* row_scales =
        row_scales_of_head(params.row_scales.q, rows, params.q_batch_step, params.table.num_heads, params.seqlen_q);
    const int row = rows.row_begin + first_row + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale_log2[i] = scale_of_row(params.softmax_scale_log2, row_scales[min(row + 8 * i, rows.row_end - 1)]);
    }
  }

  __device__ void issue_s(int q_stage, int k_stage) {
    const auto q = operands.q(q_stage), k = operands.k(k_stage);
    issue_limb_mma<Config::kLimbs>([&](int q_limb, int k_limb, bool overwrites) {
      add_row_mma<Factor, Config::kHeadDim, Config::kSlabBytesM, Config::kSlabBytesN>(
          s, q.advance(q_limb * Config::kLimbBytesM), k.advance(k_limb * Config::kLimbBytesN), overwrites);
    });
  }

  __device__ void issue_o(int v_stage) {
    const auto v = operands.v(v_stage);
    issue_limb_mma<Config::kLimbs>([&](int p_limb, int v_limb, bool overwrites) {
      add_column_mma<Factor>(tile_o, p.limbs[p_limb], v.advance(v_limb * Config::kLimbBytesN), overwrites);
    });
  }

  __device__ void finish_s(FwdSharedStorage<Config>& shared, Ring use) {
    wait_full(shared.row_scales.pipe, use);
    scale_columns(shared.row_scales.tiles[use.stage()].k);
  }

  __device__ void wait() {
    ptx::wgmma_wait<0>(tile_o, s);
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 2; ++i) o[i] = fmaf(tile_o[i], v_scale, o[i]);
  }

  // Before it is split, p takes over what the row_scale of their value falls short of the tile's largest.
  __device__ void take_p(FwdSharedStorage<Config>& shared, Ring use) {
    const TileRowScales<Config::kBlockN>& row_scales = shared.row_scales.tiles[use.stage()];
    scale_columns(row_scales.v);
#pragma unroll
    for (int i = 0; i < Config::kBlockN / 4; ++i) p.set(i, s[2 * i], s[2 * i + 1]);
    v_scale = row_scales.largest_v;
    sync_and_release(shared.row_scales.pipe, use);
  }

 private:
  __device__ void scale_columns(const float (&factors)[Config::kBlockN]) {
    const ColumnNumbers numbers(factors);
#pragma unroll
    for (int i = 0; i < Config::kBlockN / 2; ++i) s[i] *= numbers[i];
  }
};

// Makes scores of the accumulators s, -inf where there is no key. The tile, counted within the work item, has not been
// released yet.
template <typename Config>
__device__ inline void finish_scores(const FwdKernelParams& params, FwdSharedStorage<Config>& shared,
                                     FwdMma<Config>& mma, const Walk<Config>& item, const TileShare& share,
                                     RingUse<Config::kStages> use, int tile) {
  mma.finish_s(shared, use);
  if constexpr (Config::kIsMasked) {
    mask_keys(mma.s, shared.key_bits[use.stage()]);
  } else if (tile < share.num_partial) {
    mask_columns(mma.s, item.ranges()[tile].tail);
  }
}

// Rows of the output, or of a sum, by the factors of a thread's two rows.
template <int kCount>
__device__ inline void scale_rows(float (&o)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= factor[row_of(i)];
}

}  // namespace mixed_attention::cuda::hopper
