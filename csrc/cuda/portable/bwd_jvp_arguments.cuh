// The backward of out and its tangents together, in two kernels, one over tiles of queries and one over tiles of keys.
// Both recompute p, behind small kernels that prepare three numbers for each query. Nothing is added
// atomically, and repeats are bitwise equal.
//
// With m dropout's factors, y and y2 the gradients of out' and out, and, of a row,
//
//   mu = lse'     eps = <y, out> - dlse'     gamma = <y, out'> + <y2, out> - dlse
//
// for each pair: z = s' - mu, g = p (m y · v - eps), ds = p (m (y2 · v + y · v') - gamma) + z g, and
//
//   dq = scale (ds k + g k')     dk = scale (dsᵀ q + gᵀ q')     dv = (m p)ᵀ y2 + (m p z)ᵀ y     dq' = scale g k
#pragma once

#include "cuda/portable/block_context.cuh"
#include "cuda/portable/bwd_arguments.cuh"
#include "cuda/portable/dropout_marks.cuh"
#include "cuda/portable/scores.cuh"
#include "cuda/portable/store_grad.cuh"
#include "cuda/portable/tangent_config.h"
#include "cuda/portable/tensor_core.cuh"
#include "derivatives_params.h"

namespace mixed_attention::cuda::portable {

// What the kernels for gradients of tangents in one direction read and write.
struct BwdJvpArguments {
  BwdArguments bwd;  // its delta: gamma
  Tangents tangents;
  const void* out_dot;   // (batch_size, seqlen_q, num_heads, head_dim_v)
  const void* dout_dot;  // likewise
  void* dq_dot;          // (batch_size, seqlen_q, num_heads, head_dim); or null
  Strides out_dot_strides, dout_dot_strides, dq_dot_strides;
  const float* mu;        // (batch_size, num_heads, seqlen_q)
  float* eps;             // likewise
  float* partial_dq_dot;  // BwdJvpBuffers
};

// Tiles of the tensors whose rows are queries, and of those whose rows are keys. One kernel owns a tile of the former
// and streams the latter, the other one does it the other way round.
template <class Tile>
struct QuerySide {
  Tile q, q_dot, dout, dout_dot;
};
template <class Tile>
struct KeySide {
  Tile k, v, k_dot, v_dot;
};

// The side that a kernel owns, where gradients of its tensors wait to be stored in the end, and the one that it
// streams.
template <template <class> class OwnedSide, template <class> class StreamedSide, Arithmetic kArithmetic, int kHeadDim>
struct BwdJvpShared {
  static constexpr Tile kTile = bwd_jvp_tile(kArithmetic, kHeadDim);
  using Element = typename MmaOf<kArithmetic>::Element;

  OwnedSide<SharedTile<Element, kTile.rows, kHeadDim>> owned;
  StreamedSide<SharedTile<Element, kTile.block_rows, kHeadDim>> streamed[kTile.stages];
};

// Starts to load rows of a tensor, unless it is null: then it is not there, and nobody reads the tile.
template <int kThreads, class Element, class Tile>
__device__ void load_present(Tile& tile, const BlockContext<Element, BwdArguments>& context, const void* tensor,
                             const Strides& strides, int64_t num_cols, int row_begin, int num_rows,
                             const bool* mask = nullptr) {
  if (tensor == nullptr) return;
  load_tile<kThreads>(tile, context.rows(tensor, strides, num_cols), row_begin, num_rows, mask);
}

template <int kThreads, class Element, class Tile>
__device__ void load_side(QuerySide<Tile>& side, const BlockContext<Element, BwdArguments>& context,
                          const BwdJvpArguments& args, int row_begin, int num_rows) {
  const BwdParams& params = args.bwd.params;
  const auto load = [&](Tile& tile, const void* tensor, const Strides& strides, int64_t num_cols) {
    load_present<kThreads>(tile, context, tensor, strides, num_cols, row_begin, num_rows);
  };
  load(side.q, params.q, params.q_strides, params.head_dim);
  load(side.q_dot, args.tangents.q, args.tangents.q_strides, params.head_dim);
  load(side.dout, params.dout, params.dout_strides, params.head_dim_v);
  load(side.dout_dot, args.dout_dot, args.dout_dot_strides, params.head_dim_v);
}

// Rows that the mask blocks become zero.
template <int kThreads, class Element, class Tile>
__device__ void load_side(KeySide<Tile>& side, const BlockContext<Element, BwdArguments>& context,
                          const BwdJvpArguments& args, int row_begin, int num_rows, const bool* mask) {
  const BwdParams& params = args.bwd.params;
  const auto load = [&](Tile& tile, const void* tensor, const Strides& strides, int64_t num_cols) {
    load_present<kThreads>(tile, context, tensor, strides, num_cols, row_begin, num_rows, mask);
  };
  load(side.k, params.k, params.k_strides, params.head_dim);
  load(side.v, params.v, params.v_strides, params.head_dim_v);
  load(side.k_dot, args.tangents.k, args.tangents.k_strides, params.head_dim);
  load(side.v_dot, args.tangents.v, args.tangents.v_strides, params.head_dim_v);
}

// Scores, their tangents z, and products of gradients with values, e and x. multiply(result, query tile, key tile) adds
// a product; relate() takes the scores to where their references are.
template <class Queries, class Keys, class Scores, class Multiply, class Relate>
__device__ void multiply_sides(const BwdJvpArguments& args, const QuerySide<Queries>& queries,
                               const KeySide<Keys>& keys, Scores& p, Scores& z, Scores& e, Scores& x,
                               const Multiply& multiply, const Relate& relate) {
  const Tangents& tangents = args.tangents;
  multiply(p, queries.q, keys.k);
  relate();
  if (tangents.q != nullptr) multiply(z, queries.q_dot, keys.k);
  if (tangents.k != nullptr) multiply(z, queries.q, keys.k_dot);
  multiply(e, queries.dout_dot, keys.v);
  if (args.bwd.params.dout != nullptr) multiply(x, queries.dout, keys.v);
  if (tangents.v != nullptr) multiply(x, queries.dout_dot, keys.v_dot);
}

// What becomes of the scores of a pair. On entry p bears the marks of dropped ones, and e and x, which are products of
// gradients with values, dropout's factors; z is s' but for the scale.
struct PairGradients {
  float g, ds, pz;

  __device__ PairGradients(float p, float e, float x, float z, float scale, float mu, float eps, float gamma) {
    const float own = fabsf(p), moved = fmaf(z, scale, -mu);
    g = own * (e - eps);
    ds = fmaf(moved, g, own * (x - gamma));
    pz = own * moved;
  }
};

}  // namespace mixed_attention::cuda::portable
