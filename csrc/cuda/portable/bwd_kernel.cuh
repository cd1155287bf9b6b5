// Backward, in two forms. Both recompute the probabilities out of the log-sum-exps, behind a small kernel that prepares
// two numbers for each query.
//
// The faster form is one kernel over tiles of keys: it owns dk and dv and adds its part of dq to a sum in fp32, in
// whatever order the thread blocks come. The deterministic form computes dq in a second kernel, over tiles of queries,
// at the price of two of then seven products: nothing is added atomically, and repeats are bitwise equal.
//
// With p the probabilities, m dropout's factors and dp = dout · vᵀ:  ds = p (m dp - delta), delta = Σ out dout - dlse,
// dv = (m p)ᵀ dout, dk = scale dsᵀ q, dq = scale ds k.
#pragma once

#include "cuda/portable/config.h"
#include "cuda/portable/dq_sum.cuh"
#include "cuda/portable/dropout.cuh"
#include "cuda/portable/scores.cuh"
#include "cuda/portable/tensor_core.cuh"
#include "cuda/portable/tile_iterator.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/named_barrier.cuh"

namespace mixed_attention::cuda::portable {

constexpr float kLog2E = 1.44269504088896340736f;

struct BwdArguments {
  BwdParams params;
  WorkTable work;
  DropoutParams dropout;
  float softmax_scale, scale_log2;
  bool aligned;     // rows of all tensors start at multiples of 16 bytes
  float unit;       // by how much tensor cores may be off, relative to the sum of the products' sizes
  float* lse_log2;  // BwdPlan
  float* delta;
  RowReference* references;
  int* has_references;
  float *partial_dq, *partial_dk, *partial_dv;
  DqSum dq_sum;
};

// A row of queries among all (batch, head, query).
struct QueryRow {
  int64_t batch, head, row;

  __device__ QueryRow(const BwdParams& params, int64_t index)
      : batch(index / params.seqlen_q / params.num_heads),
        head(index / params.seqlen_q % params.num_heads),
        row(index % params.seqlen_q) {}

  // Where it begins.
  template <class Element>
  __device__ const Element* in(const void* tensor, const Strides& strides) const {
    return static_cast<const Element*>(tensor) + batch * strides.batch + row * strides.row + head * strides.head;
  }
};

// By eight lanes. work: key segments, each with the queries that read it.
template <class Element>
__device__ RowReference find_reference(const BwdArguments& args, const WorkView& work, const QueryRow& query) {
  const BwdParams& params = args.params;
  const Element* k = query.in<Element>(params.k, {params.k_strides.batch, 0, params.k_strides.head});
  const bool* mask = params.key_padding_mask;
  if (mask != nullptr) mask += query.batch * params.key_padding_mask_batch_stride;
  const auto for_each_key = [&](const auto& visit) {
    for (int i = 0; i < args.work.num_segments; ++i) {
      const WorkSegment& segment = work.segments[i];
      for (int j = 0; j < segment.num_ranges; ++j) {
        const WorkRange& readers = work.ranges[segment.first_range + j];
        if (query.row < readers.begin || query.row >= readers.end) continue;
        for (int key = segment.row_begin; key < segment.row_end; ++key) {
          if (mask == nullptr || mask[key]) visit(k + key * params.k_strides.row);
        }
      }
    }
  };
  return cuda::find_reference(query.in<Element>(params.q, params.q_strides), static_cast<int>(params.head_dim),
                              args.scale_log2, args.unit, for_each_key);
}

// One warp to a row (batch, head, query) of lse_log2, delta and references.
template <class Element>
__global__ void portable_bwd_stats_kernel(const __grid_constant__ BwdArguments args,
                                          const __grid_constant__ InlineWork in_parameters) {
  const BwdParams& params = args.params;
  const int64_t num_rows = params.batch_size * params.num_heads * params.seqlen_q;
  const auto index_of = [](int lanes) {
    return (static_cast<int64_t>(blockIdx.x) * blockDim.x) / 32 + static_cast<int>(threadIdx.x) / lanes;
  };
  const int64_t index = min(index_of(32), num_rows - 1);
  const QueryRow query(params, index);
  const auto* out = query.in<Element>(params.out, params.out_strides);
  const auto* dout = query.in<Element>(params.dout, params.dout_strides);
  float delta = 0;
  for (int64_t col = threadIdx.x % 32; col < params.head_dim_v; col += 32) {
    delta += static_cast<float>(out[col]) * static_cast<float>(dout[col]);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(0xFFFFFFFF, delta, lanes);
  const float* lse = static_cast<const float*>(params.lse);
  if (threadIdx.x % 32 == 0) {
    // +inf makes the probabilities of a row without keys zero.
    args.lse_log2[index] = lse[index] == -INFINITY ? INFINITY : lse[index] * kLog2E;
    args.delta[index] = params.dlse == nullptr ? delta : delta - static_cast<const float*>(params.dlse)[index];
    args.references[index] = {0, -INFINITY, 0};
  }
  if (!__syncthreads_or(needs_reference(lse[index] * kLog2E))) return;
  if (threadIdx.x == 0) *args.has_references = 1;

  constexpr int kLanes = RowProducts<Element>::kLanes;
  const int64_t own = index_of(kLanes);
  if (threadIdx.x >= blockDim.x / 32 * kLanes || own >= num_rows || !needs_reference(lse[own] * kLog2E)) return;
  const RowReference reference = find_reference<Element>(args, view(args.work, in_parameters), QueryRow(params, own));
  if (threadIdx.x % kLanes != 0) return;
  args.references[own] = reference;
  args.lse_log2[own] = reference.sum_log2;
}

// The way out of dq's sum, one warp to a row.
template <class Element>
__global__ void portable_dq_sum_kernel(const __grid_constant__ BwdArguments args) {
  const BwdParams& params = args.params;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (index >= params.batch_size * params.num_heads * params.seqlen_q) return;
  const int64_t row = index % params.seqlen_q, copy = index / params.seqlen_q;
  Element* dq = static_cast<Element*>(params.dq) + copy / params.num_heads * params.dq_strides.batch +
                row * params.dq_strides.row + copy % params.num_heads * params.dq_strides.head;
  for (int col = threadIdx.x % 32; col < params.head_dim; col += 32) {
    dq[col] = Element(args.dq_sum.at(index, col) * args.softmax_scale);
  }
}

// The accumulators' way out: to a part's place in scratch, or times factor to the gradient, through shared memory. They
// begin at row warp_row and column warp_col of the tile.
template <int kWarpRows, class Element, int kRows, int kCols, int kTilesM, int kTilesN>
__device__ void store_grad(float (&grad)[kTilesM][kTilesN][4], float factor, float* partial,
                           SharedTile<Element, kRows, kCols>& staging, const GlobalRows<Element>& rows, int warp_row,
                           int warp_col, const WorkItem& item) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) grad[m][n][e] *= factor;
    }
  }
  const int row_begin = item.row_begin + warp_row, num_rows = min(kWarpRows, item.num_rows - warp_row);
  if (partial != nullptr) {
    store_fp32(partial + static_cast<int64_t>(row_begin) * rows.num_cols, rows.num_cols, num_rows, warp_col, grad);
    return;
  }
  put_accumulators(staging, warp_row, warp_col, grad);
  __syncwarp();
  store_rows<kWarpRows, 8 * kTilesN>(staging, warp_row, warp_col, rows, row_begin, num_rows);
}

template <class Products>
__device__ __forceinline__ float weight_of(float score, float scale_log2, float lse_log2) {
  return ptx::exp2(fmaf(restored_score<Products::kLosesInfinities>(score), scale_log2, -lse_log2));
}

// dq: a thread block owns queries and streams keys.
template <Arithmetic kArithmetic, int kHeadDim>
struct DqShared {
  static constexpr Tile kTile = dq_tile(kArithmetic, kHeadDim);
  using Element = typename ProductsOf<kArithmetic>::Element;

  SharedTile<Element, kTile.rows, kHeadDim> q, dout;  // q: and dq, at the end
  SharedTile<Element, kTile.block_rows, kHeadDim> k[kTile.stages], v[kTile.stages];
};

template <Arithmetic kArithmetic, int kHeadDim>
__global__ void __launch_bounds__(dq_tile(kArithmetic, kHeadDim).num_threads(), dq_tile(kArithmetic, kHeadDim).blocks)
    portable_dq_kernel(const __grid_constant__ BwdArguments args, const __grid_constant__ InlineWork in_parameters) {
  using Products = ProductsOf<kArithmetic>;
  using Shared = DqShared<kArithmetic, kHeadDim>;
  using Element = typename Products::Element;
  constexpr Tile kTile = Shared::kTile;
  constexpr int kThreads = kTile.num_threads(), kTilesM = kTile.warp_rows / 16, kTilesN = kTile.block_rows / 8;
  extern __shared__ __align__(16) char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

  const BwdParams& params = args.params;
  const WorkView work = view(args.work, in_parameters);
  const WorkItem item = locate(args.work, work, blockIdx.x, kTile.rows, params.num_heads);
  const auto rows = [&](const void* tensor, const Strides& strides, int64_t num_cols) {
    return rows_of<Element>(tensor, strides, item.batch, item.head, num_cols, args.aligned);
  };
  const auto k = rows(params.k, params.k_strides, params.head_dim);
  const auto v = rows(params.v, params.v_strides, params.head_dim_v);
  const bool* mask = params.key_padding_mask;
  if (mask != nullptr) mask += item.batch * params.key_padding_mask_batch_stride;
  const int64_t copy = static_cast<int64_t>(item.batch) * params.num_heads + item.head;
  const int warp_row = threadIdx.x / 32 * kTile.warp_rows;
  const int thread_row = warp_row + threadIdx.x % 32 / 4;

  BlockWalk<kTile.block_rows> walk(work, item, args.work.num_splits);
  using Streamed = SharedTile<Element, kTile.block_rows, kHeadDim>;
  const TileLoader<kThreads, Streamed> keys(shared.k, k, mask), values(shared.v, v, mask);
  const auto load_next = [&](int stage) {
    const Block block = walk.block();
    keys.load(stage, block.row_begin, block.num_rows);
    values.load(stage, block.row_begin, block.num_rows);
  };
  load_tile<kThreads>(shared.q, rows(params.q, params.q_strides, params.head_dim), item.row_begin, item.num_rows);
  load_tile<kThreads>(shared.dout, rows(params.dout, params.dout_strides, params.head_dim_v), item.row_begin,
                      item.num_rows);
  if (!walk.done()) load_next(0);

  const int64_t first_row = copy * params.seqlen_q + item.row_begin + thread_row;
  float lse_log2[2 * kTilesM], delta[2 * kTilesM];
  bool has_reference = false;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const bool is_row = thread_row + 8 * i < item.num_rows;
    lse_log2[i] = is_row ? args.lse_log2[first_row + 8 * i] : INFINITY;
    delta[i] = is_row ? args.delta[first_row + 8 * i] : 0;
    has_reference |= is_row && args.references[first_row + 8 * i].score != 0;
  }
  // Where infinities were lost, and the infinity without a weight is the upper one, scores are gone through as well.
  has_reference |= Products::kLosesInfinities && args.scale_log2 < 0;
  has_reference = __any_sync(0xFFFFFFFF, has_reference);

  const LaneTile lane_q(shared.q);
  float dq[kTilesM][kHeadDim / 8][4] = {};
  for (int stage = 0; !walk.done(); stage = (stage + 1) % kTile.stages) {
    ptx::cp_async_wait_all();
    __syncthreads();
    const Block block = walk.block();
    walk.advance();

    float s[kTilesM][kTilesN][4] = {}, dp[kTilesM][kTilesN][4] = {};
    multiply_rows<Products>(s, lane_q, warp_row, lane_q.at(shared.k[stage]));
    if (has_reference) {
      relate_rows<Products::kLosesInfinities>(s, args.references + first_row, item.num_rows - thread_row,
                                              copysignf(1, args.scale_log2));
    }
    multiply_rows<Products>(dp, lane_q.at(shared.dout), warp_row, lane_q.at(shared.v[stage]));
    // Behind the products, whose last results take a while.
    if (kTile.stages == 2 && !walk.done()) load_next(stage ^ 1);
    if (args.dropout.seed != nullptr) {
      const Dropout dropout(args.dropout, static_cast<int>(copy));
      const WorkRange& range = walk.range_of(block);
      drop_columns(dp, dropout, item.row_begin + thread_row, range.range_index, block.row_begin - range.begin);
    }
    const bool all_visible = block.num_rows == kTile.block_rows && mask == nullptr;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = 8 * n + threadIdx.x % 4 * 2 + e;
        // Keys behind the block's end have the score 0 here, whose probability may even be infinite.
        const bool visible = all_visible || (col < block.num_rows && (mask == nullptr || mask[block.row_begin + col]));
#pragma unroll
        for (int i = 0; i < 2 * kTilesM; ++i) {
          float& score = s[i / 2][n][i % 2 * 2 + e];
          const float p = weight_of<Products>(score, args.scale_log2, lse_log2[i]);
          score = visible ? p * (dp[i / 2][n][i % 2 * 2 + e] - delta[i]) : 0.0f;
        }
      }
    }
    multiply_scores<Products>(dq, s, lane_q.at(shared.k[stage]));
    if (kTile.stages == 1 && !walk.done()) {
      __syncthreads();
      load_next(0);
    }
  }

  ptx::cp_async_wait_all();  // of the queries, where there was no key
  __syncthreads();
  float* partial = args.partial_dq;
  if (partial != nullptr) {
    partial += (copy + static_cast<int64_t>(item.split) * params.batch_size * params.num_heads) * params.seqlen_q *
               params.head_dim;
  }
  store_grad<kTile.warp_rows>(dq, args.softmax_scale, partial, shared.q,
                              rows(params.dq, params.dq_strides, params.head_dim), warp_row, 0, item);
}

// dk and dv: a thread block owns keys and streams queries. Scores are transposed here: rows are keys. A warp has some
// of the keys to itself, or shares them (Tile::sharing): then each sharer sums some columns of dk and dv over all
// queries of a block, but computes the scores of some queries only, and takes the others' from shared memory.
enum class Grads { kAll, kKeyAndValue, kKey, kValue };

// Transposed scores of a warp become probabilities. lse_log2: of the scores' queries, in shared memory.
template <class Products, int kTilesM, int kTilesN>
__device__ void to_probabilities(float (&s)[kTilesM][kTilesN][4], const float* lse_log2, float scale_log2) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const float2 lse = *reinterpret_cast<const float2*>(&lse_log2[8 * n + threadIdx.x % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      float* pair = &s[i / 2][n][i % 2 * 2];
      pair[0] = weight_of<Products>(pair[0], scale_log2, lse.x);
      pair[1] = weight_of<Products>(pair[1], scale_log2, lse.y);
    }
  }
}

// A dropped probability carries a minus sign until its score's gradient is known: both m and p stand in one register.
template <int kTilesM, int kTilesN>
__device__ void mark_dropped(float (&p)[kTilesM][kTilesN][4], const Dropout& dropout, int query_row, int range_index,
                             int key) {
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& weight = p[i / 2][n][i % 2 * 2 + e];
        const int row = query_row + 8 * n + threadIdx.x % 4 * 2 + e;
        if (dropout.weight(row, range_index, key + 8 * i) == 0) weight = -weight;
      }
    }
  }
}

__device__ inline bool is_dropped(float weight) { return __float_as_uint(weight) >> 31; }

template <int kTilesM, int kTilesN>
__device__ void zero_dropped(float (&p)[kTilesM][kTilesN][4]) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) p[m][n][e] = is_dropped(p[m][n][e]) ? 0 : p[m][n][e];
    }
  }
}

// Multiplies dp by dropout's factors, which p was marked with.
template <int kTilesM, int kTilesN>
__device__ void drop_marked(float (&dp)[kTilesM][kTilesN][4], const float (&p)[kTilesM][kTilesN][4], float factor) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dp[m][n][e] = is_dropped(p[m][n][e]) ? 0 : dp[m][n][e] * factor;
    }
  }
}

// dp becomes ds. delta: of the scores' queries, in shared memory.
template <int kTilesM, int kTilesN>
__device__ void to_score_gradients(float (&dp)[kTilesM][kTilesN][4], const float (&p)[kTilesM][kTilesN][4],
                                   const float* delta) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const float2 means = *reinterpret_cast<const float2*>(&delta[8 * n + threadIdx.x % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = dp[i / 2][n][i % 2 * 2 + e];
        score = fabsf(p[i / 2][n][i % 2 * 2 + e]) * (score - (e == 0 ? means.x : means.y));
      }
    }
  }
}

// Bit i of rows stands for the thread's row i: two for each tile of 16.
template <int kTilesM, int kTilesN>
__device__ void zero_rows(float (&c)[kTilesM][kTilesN][4], unsigned rows) {
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      if (rows >> i & 1) c[i / 2][n][i % 2 * 2] = c[i / 2][n][i % 2 * 2 + 1] = 0;
    }
  }
}

template <Arithmetic kArithmetic, int kHeadDim, Grads kGrads>
struct DkDvShared {
  static constexpr Tile kTile = dk_dv_tile(kArithmetic, kHeadDim);
  using Element = typename ProductsOf<kArithmetic>::Element;
  struct Nothing {};

  SharedTile<Element, kTile.rows, kHeadDim> k, v;  // and dk, dv, at the end
  SharedTile<Element, kTile.block_rows, kHeadDim> q[kTile.stages], dout[kTile.stages];
  float lse_log2[kTile.stages][kTile.block_rows], delta[kTile.stages][kTile.block_rows];
  // ds for dq. Where warps share keys, each takes p and ds, by turns, of all the block's queries from here.
  [[no_unique_address]] std::conditional_t<kGrads == Grads::kAll || (kTile.sharing > 1),
                                           SharedTile<Element, kTile.rows, kTile.block_rows>, Nothing> scores;
};

// Adds the block's part of dq, dsᵀ k, to the sum: num_rows rows from row_begin on. Each warp takes 16 or 32 queries and
// an equal share of the columns.
template <class Products, int kThreads, class SharedDs, class Keys>
__device__ void add_dq(const DqSum& sum, int64_t row_begin, int num_rows, const SharedDs& ds, const Keys& k) {
  constexpr int kCols = Keys::kCols, kTilesM = SharedDs::kCols >= 64 ? 2 : 1;
  constexpr int kRowGroups = SharedDs::kCols / 16 / kTilesM, kWarpsPerGroup = kThreads / 32 / kRowGroups;
  // Columns are loaded 16 at a time; where they do not go round, half of the warps stands by.
  constexpr int kColGroups = kCols / 16 % kWarpsPerGroup == 0 ? kWarpsPerGroup : kWarpsPerGroup / 2;
  constexpr int kTilesN = kCols / 8 / kColGroups;
  static_assert(kTilesN % 2 == 0 && kTilesN * 8 * kColGroups == kCols);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp % kRowGroups * 16 * kTilesM, col = warp / kRowGroups * kTilesN * 8;
  if (kColGroups < kWarpsPerGroup && col >= kCols) return;
  // A few columns at a time: dk and dv leave few registers.
  constexpr int kMostTiles = 4 * kTilesM;
  constexpr int kTilesAtOnce = kTilesN <= kMostTiles ? kTilesN : kTilesN % kMostTiles == 0 ? kMostTiles : 2;
#pragma unroll 1
  for (int first = col; first < col + kTilesN * 8; first += kTilesAtOnce * 8) {
    float dq[kTilesM][kTilesAtOnce][4] = {};
    const auto load_ds = [&](int m, int step) { return Products::load_a_by_depth(ds, row + 16 * m, step); };
    multiply_columns<Products>(dq, load_ds, k, first);
    float* const place = sum.place(row_begin + row + lane / 4, first, lane % 4);
    const auto add = [&]<bool kAll>() {
#pragma unroll
      for (int i = 0; i < 2 * kTilesM; ++i) {
        if (!kAll && row + lane / 4 + 8 * i >= num_rows) continue;
        float* const row_place = ptx::keep(place + 8 * i * sum.num_cols);
#pragma unroll
        for (int n = 0; n < kTilesAtOnce; ++n) {
          if (!kAll && first + 8 * n >= sum.num_cols) continue;
          DqSum::add(row_place + n * DqSum::kBlock, &dq[i / 2][n][i % 2 * 2]);
        }
      }
    };
    // A check for each tile costs more than its addition.
    if (num_rows == SharedDs::kCols && first + 8 * kTilesAtOnce <= sum.num_cols) {
      add.template operator()<true>();
    } else {
      add.template operator()<false>();
    }
  }
}

template <Arithmetic kArithmetic, int kHeadDim, Grads kGrads>
__global__ void __launch_bounds__(dk_dv_tile(kArithmetic, kHeadDim).num_threads(),
                                  dk_dv_tile(kArithmetic, kHeadDim).blocks)
    portable_dk_dv_kernel(const __grid_constant__ BwdArguments args, const __grid_constant__ InlineWork in_parameters) {
  using Products = ProductsOf<kArithmetic>;
  using Shared = DkDvShared<kArithmetic, kHeadDim, kGrads>;
  using Element = typename Products::Element;
  constexpr Tile kTile = Shared::kTile;
  constexpr bool kWantsDk = kGrads != Grads::kValue, kWantsDv = kGrads != Grads::kKey, kAddsDq = kGrads == Grads::kAll;
  constexpr bool kShares = kTile.sharing > 1;
  constexpr int kThreads = kTile.num_threads(), kTilesM = kTile.warp_rows / 16, kWarpCols = kHeadDim / kTile.sharing;
  constexpr int kScoreRows = kTile.score_rows(), kTurns = kTile.block_rows / kTile.sharing / kScoreRows;
  static_assert(!kShares || (kTurns == 1 && is_16_bit(kArithmetic)));  // fp32 operands by depth want another order
  extern __shared__ __align__(16) char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

  const BwdParams& params = args.params;
  const WorkView work = view(args.work, in_parameters);
  const WorkItem item = locate(args.work, work, blockIdx.x, kTile.rows, params.num_heads);
  const auto rows = [&](const void* tensor, const Strides& strides, int64_t num_cols) {
    return rows_of<Element>(tensor, strides, item.batch, item.head, num_cols, args.aligned);
  };
  const auto q = rows(params.q, params.q_strides, params.head_dim);
  const auto dout = rows(params.dout, params.dout_strides, params.head_dim_v);
  const bool* mask = params.key_padding_mask;
  if (mask != nullptr) mask += item.batch * params.key_padding_mask_batch_stride;
  const int64_t copy = static_cast<int64_t>(item.batch) * params.num_heads + item.head;
  const int64_t first_query = copy * params.seqlen_q;  // of lse_log2, delta and dq_sum
  // A warp's keys; among the warps that share them, its part of the gradients' columns and of a block's queries
  const int warp = threadIdx.x / 32, sharer = warp % kTile.sharing;
  const int warp_row = warp / kTile.sharing * kTile.warp_rows, warp_col = ptx::keep(sharer * kWarpCols);
  const int thread_row = warp_row + threadIdx.x % 32 / 4;
  const auto sync_sharers = [&] { ptx::named_barrier_sync(1 + warp / kTile.sharing, 32 * kTile.sharing); };

  // Rows behind the block's end are zero throughout: their probabilities come out as 1, their gradients as 0.
  BlockWalk<kTile.block_rows> walk(work, item, args.work.num_splits);
  using Streamed = SharedTile<Element, kTile.block_rows, kHeadDim>;
  const TileLoader<kThreads, Streamed> queries(shared.q, q), douts(shared.dout, dout);
  const auto load_next = [&](int stage) {
    const Block block = walk.block();
    queries.load(stage, block.row_begin, block.num_rows);
    douts.load(stage, block.row_begin, block.num_rows);
    static_assert(kThreads >= kTile.block_rows);
    if (threadIdx.x < kTile.block_rows) {
      const int bytes = threadIdx.x < block.num_rows ? 4 : 0;
      const int64_t row = first_query + (bytes ? block.row_begin + threadIdx.x : 0);
      ptx::cp_async_4(&shared.lse_log2[stage][threadIdx.x], args.lse_log2 + row, bytes);
      ptx::cp_async_4(&shared.delta[stage][threadIdx.x], args.delta + row, bytes);
    }
  };
  load_tile<kThreads>(shared.k, rows(params.k, params.k_strides, params.head_dim), item.row_begin, item.num_rows, mask);
  load_tile<kThreads>(shared.v, rows(params.v, params.v_strides, params.head_dim_v), item.row_begin, item.num_rows,
                      mask);
  if (!walk.done()) load_next(0);

  // Rows behind the tile's end or blocked by the mask: what comes of their zeroed values is nobody's gradient.
  unsigned hidden = 0;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int row = thread_row + 8 * i;
    if (row >= item.num_rows || (mask != nullptr && !mask[item.row_begin + row])) hidden |= 1u << i;
  }
  const bool some_hidden = item.num_rows < kTile.rows || mask != nullptr;
  const bool drops = args.dropout.seed != nullptr;
  // NOTE: to ask for each block whether one of its queries has a reference costs all calls a few percent.
  const bool some_references = *args.has_references != 0 || (Products::kLosesInfinities && args.scale_log2 < 0);

  const LaneTile lane_k(shared.k);
  float dk[kWantsDk ? kTilesM : 1][kWarpCols / 8][4] = {}, dv[kWantsDv ? kTilesM : 1][kWarpCols / 8][4] = {};
  for (int stage = 0; !walk.done(); stage = (stage + 1) % kTile.stages) {
    ptx::cp_async_wait_all();
    __syncthreads();
    const Block block = walk.block();
    walk.advance();
    if (kTile.stages == 2 && !walk.done()) load_next(stage ^ 1);
    const auto lane_q = lane_k.at(shared.q[stage]);
    const auto lane_dout = lane_k.at(shared.dout[stage]);

    // A gradient's sum takes up a warp's scores of some queries, or, from shared memory, those of all sharers.
    const auto add_products = [&](auto& grad, const auto& scores, const auto& tile, int query) {
      if constexpr (kShares) {
        sync_sharers();
        const auto load = [&](int m, int k) { return load_a<Products>(shared.scores, warp_row + 16 * m, k); };
        multiply_columns<Products>(grad, load, tile, warp_col);
      } else {
        multiply_scores<Products>(grad, scores, tile, query);
      }
    };
    const int num_turns = kTurns == 1 ? 1 : (block.num_rows + kScoreRows - 1) / kScoreRows;
#pragma unroll 1
    for (int turn = 0; turn < num_turns; ++turn) {
      const int query = (turn * kTile.sharing + sharer) * kScoreRows;
      float p[kTilesM][kScoreRows / 8][4] = {}, ds[kTilesM][kScoreRows / 8][4] = {};
      multiply_rows<Products>(p, lane_k, warp_row, lane_q, query);
      if (some_references) {
        relate_columns<Products::kLosesInfinities>(p, args.references + first_query + block.row_begin + query,
                                                   block.num_rows - query, copysignf(1, args.scale_log2));
      }
      if constexpr (!Products::kLosesInfinities) {
        if (block.num_rows < kTile.block_rows) clear_columns(p, block.num_rows - query);
      }
      if constexpr (kWantsDk) multiply_rows<Products>(ds, lane_k.at(shared.v), warp_row, lane_dout, query);
      // The exponentials run under the second product: nothing may stand between them.
      to_probabilities<Products>(p, shared.lse_log2[stage] + query, args.scale_log2);
      if (drops || some_hidden) {
        if (drops) {
          const WorkRange& range = walk.range_of(block);
          const int key = item.row_begin + thread_row - work.segments[item.segment].row_begin + range.range_offset;
          mark_dropped(p, Dropout(args.dropout, static_cast<int>(copy)), block.row_begin + query, range.range_index,
                       key);
          if constexpr (kWantsDk) drop_marked(ds, p, args.dropout.inverse_keep_probability);
        }
        if constexpr (kWantsDk) to_score_gradients(ds, p, shared.delta[stage] + query);
        if (drops) zero_dropped(p);
        if (kAddsDq && some_hidden) zero_rows(ds, hidden);
      } else if constexpr (kWantsDk) {
        to_score_gradients(ds, p, shared.delta[stage] + query);
      }
      const auto add_to_dv = [&] {
        if constexpr (kShares) put_accumulators(shared.scores, warp_row, query, p);
        add_products(dv, p, lane_dout, query);
      };
      // ds stays in shared memory for dq: p is handed over before it. Where nothing is, dk first spills less.
      if constexpr (kWantsDv && kShares) add_to_dv();
      if constexpr (kWantsDk) {
        if constexpr (kShares) sync_sharers();  // p has been read
        if constexpr (kAddsDq || kShares) put_accumulators(shared.scores, warp_row, query, ds);
        add_products(dk, ds, lane_q, query);
      }
      if constexpr (kWantsDv && !kShares) add_to_dv();
    }
    // All of ds is there, and nobody reads the queries any more.
    if (kAddsDq || kTile.stages == 1) __syncthreads();
    if (kTile.stages == 1 && !walk.done()) load_next(0);
    if constexpr (kAddsDq) {
      add_dq<Products, kThreads>(args.dq_sum, first_query + block.row_begin, block.num_rows, shared.scores, lane_k);
    }
  }

  // Blocked keys get no gradient.
  if (some_hidden) {
    if constexpr (kWantsDk) zero_rows(dk, hidden);
    if constexpr (kWantsDv) zero_rows(dv, hidden);
  }
  ptx::cp_async_wait_all();  // of the keys, where there was no query
  __syncthreads();
  const int64_t split_copy = copy + static_cast<int64_t>(item.split) * params.batch_size * params.num_heads;
  const auto partial_of = [&](float* partial, int64_t num_cols) {
    return partial == nullptr ? nullptr : partial + split_copy * params.seqlen_k * num_cols;
  };
  if constexpr (kWantsDk) {
    store_grad<kTile.warp_rows>(dk, args.softmax_scale, partial_of(args.partial_dk, params.head_dim), shared.k,
                                rows(params.dk, params.dk_strides, params.head_dim), warp_row, warp_col, item);
  }
  if constexpr (kWantsDv) {
    const float factor = args.dropout.seed == nullptr ? 1.0f : args.dropout.inverse_keep_probability;
    store_grad<kTile.warp_rows>(dv, factor, partial_of(args.partial_dv, params.head_dim_v), shared.v,
                                rows(params.dv, params.dv_strides, params.head_dim_v), warp_row, warp_col, item);
  }
}

}  // namespace mixed_attention::cuda::portable
