// A consumer's MMAs of the forward and its tangent, with their operands and accumulators in registers.
//
// What does not move has a tangent of zeros in shared memory, so that all calls run the same MMAs. Zero times infinity
// is not zero: a product with such a tangent takes zeros for its other side as well, so far as that is of scores. In
// the output p alone is multiplied by them, which is finite where anything is.
#pragma once

#include <cstdint>

#include "cuda/hopper/fwd/mma.cuh"
#include "cuda/hopper/jvp/config.h"
#include "cuda/hopper/jvp/params.h"
#include "cuda/hopper/jvp/softmax.cuh"
#include "cuda/hopper/tile/mma.cuh"
#include "cuda/hopper/tile/register_operand.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
struct JvpMma {
  using Element = typename Config::Element;
  using Operand = ptx::Operand;

  Operand q, q_dot, k, v;  // the first buffers of their rings, of q its rows of this consumer
  Operand k_dot, v_dot;    // only where keys move
  Operand k_of_q_dot, q_of_k_dot;

  uint32_t q_words[Config::kKeepsQueries ? Config::kHeadDim / 4 : 1];  // rows of this warp
  float s[Config::kBlockN / 2];                                        // scores, then p
  float x[Config::kBlockN / 2];                                        // tangents of scores but for their scale, then h
  uint32_t p[Config::kBlockN / 4];                                     // of the tile before
  uint32_t h[Config::kBlockN / 4];                                     // likewise
  float out[Config::kHeadDim / 2];                                     // sums of p v
  float out_dot[Config::kHeadDim / 2];                                 // sums of h v + p v'

  __device__ JvpMma(const JvpKernelParams& params, JvpSharedStorage<Config>& shared, int consumer)
      : q(Operand::make(shared.q.still).advance(consumer * kWarpgroupRows * kRowBytes)),
        q_dot(Operand::make(shared.q.dot).advance(consumer * kWarpgroupRows * kRowBytes)),
        k(Operand::make(shared.k.still)),
        v(Operand::make(shared.v.still)),
        k_of_q_dot(k) {
    if constexpr (Config::kMovesKeys) {
      k_dot = Operand::make(shared.k.dot);
      v_dot = Operand::make(shared.v.dot);
      if (!params.q.moves) k_of_q_dot = k_dot;
      q_of_k_dot = params.k.moves ? q : q_dot;
    }
  }

  // Loads the queries that stay in registers; first_row: of this warp in the tile.
  __device__ void load_queries(const JvpSharedStorage<Config>& shared, int q_stage, int first_row) {
    if constexpr (Config::kKeepsQueries) {
      load_row_operand<kRowBytes, 0>(q_words, shared.q.still[q_stage], first_row, [](int) { return true; });
    }
  }

  // Two batches: scores, and their tangents.
  __device__ void issue_scores(int q_stage, int k_stage) {
    const int q_bytes = q_stage * Config::kTileBytesM, k_bytes = k_stage * Config::kTileBytesN;
    ptx::wgmma_fence();
    if constexpr (Config::kKeepsQueries) {
      add_row_mma<Element, 0>(s, q_words, k.advance(k_bytes), true);
    } else {
      multiply(s, q.advance(q_bytes), k.advance(k_bytes), true);
    }
    ptx::wgmma_commit();
    multiply(x, q_dot.advance(q_bytes), k_of_q_dot.advance(k_bytes), true);
    if constexpr (Config::kMovesKeys) multiply(x, q_of_k_dot.advance(q_bytes), k_dot.advance(k_bytes), false);
    ptx::wgmma_commit();
  }

  // One batch.
  __device__ void issue_outputs(int v_stage) {
    const int v_bytes = v_stage * Config::kTileBytesN;
    ptx::wgmma_fence();
    add_column_mma<Element>(out, p, v.advance(v_bytes), false);
    add_column_mma<Element>(out_dot, h, v.advance(v_bytes), false);
    if constexpr (Config::kMovesKeys) add_column_mma<Element>(out_dot, p, v_dot.advance(v_bytes), false);
    ptx::wgmma_commit();
  }

  __device__ void wait() { ptx::wgmma_wait<0>(out, out_dot, s, x); }

  // Rows of both sums by the factors of a thread's two rows.
  __device__ void scale_sums(const float (&factor)[2]) {
    scale_rows(out, factor);
    scale_rows(out_dot, factor);
  }

  // Takes the last tile's h, and those before, to means that are lower by the changes of a thread's two rows.
  __device__ void move_means(const float (&change)[2]) {
    add_rows(x, s, change);
    add_rows(out_dot, out, change);
  }

  // Makes factors of p and h, which have taken the places of s and x.
  __device__ void take_factors() {
    round_operand<Element>(p, s);
    round_operand<Element>(h, x);
  }

 private:
  __device__ static void multiply(float (&d)[Config::kBlockN / 2], Operand a, Operand b, bool overwrites) {
    add_row_mma<Element, Config::kHeadDim, Config::kTileBytesM, Config::kTileBytesN>(d, a, b, overwrites);
  }
};

}  // namespace mixed_attention::cuda::hopper
