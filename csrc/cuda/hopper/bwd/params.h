// The parameters of the backward kernels as they travel to the device.
#pragma once

#include <cuda.h>

#include "cuda/common/row_reference.h"
#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/dq_accum.h"
#include "cuda/hopper/plan/key_list.h"
#include "cuda/hopper/plan/key_table.h"
#include "cuda/hopper/plan/query_table.h"
#include "params.h"

namespace mixed_attention::cuda::hopper {

// Two numbers for each query, by tiles of kQueryTileRows rows: (batch_size, num_heads, num_tiles, kStatsTileFloats).
struct QueryStats {
  float* lse_log2;  // +inf where there is no key, and where there is no query: p is 0 there
  float* delta;     // row sum of out * dout, less dlse
  int num_tiles;
};

// Two structs for each tile of fp32 queries: (batch_size, num_heads, num_tiles).
struct Fp32QueryStats {
  QueryNumbers* q;
  DoutNumbers* dout;
  int num_tiles;
};

// By how many sequences the low limbs of an fp32 input stand behind the high ones (half_limbs.h).
struct LimbSteps {
  int q, dout, k, v;
};

// What the limbs of fp32 inputs need beside their maps, which are those of all limbs: (num_limbs * num_sequences,
// seqlen, num_heads, head_dim or head_dim_v).
struct Fp32Inputs {
  const float *q_scales, *dout_scales;  // (num_sequences, num_heads, seqlen_q)
  const float *k_scales, *v_scales;     // (num_sequences, num_heads, seqlen_k)
  LimbSteps limb_steps;
  int64_t seqlen_k;
};

// Those of a kernel's inputs; 16-bit ones have none.
template <typename Params>
constexpr LimbSteps limb_steps(const Params& params) {
  if constexpr (requires { params.inputs; }) {
    return params.inputs.limb_steps;
  } else {
    return {};
  }
}

// The inputs of scores that are computed once more, and the place of their references.
struct ScoreInputs {
  const void* q;  // (batch_size, seqlen_q, num_heads, head_dim)
  const void* k;  // (batch_size, seqlen_k, num_heads, head_dim)
  Strides q_strides, k_strides;
  const bool* mask;  // (batch_size, seqlen_k), true = real token; or null
  int64_t mask_batch_stride;
  int head_dim;
  float scale_log2;
  float unit;                // by how much tensor cores may be off, relative to the sum of the products' sizes
  RowReference* references;  // (batch_size, num_heads, seqlen_q), and a tile more
};

struct ScoreSource : ScoreInputs {
  int first_range[WorkTable::kMaxSegments + 1];  // of every run of queries
  ListedRange ranges[WorkTable::kMaxRanges];
};

// The same of a list.
struct ListedScoreSource : ScoreInputs {
  const int* first_range;     // (segments of queries + 1)
  const ListedRange* ranges;  // of all of them
};

ScoreInputs score_inputs(const BwdParams& params, RowReference* references);
ScoreSource score_source(const BwdParams& params, RowReference* references);

template <typename Scores, typename Stats>
struct BwdStatsParamsOf {
  const void* out;   // (batch_size, seqlen_q, num_heads, head_dim_v)
  const void* dout;  // likewise
  Strides out_strides, dout_strides;
  const float* lse;   // (batch_size, num_heads, seqlen_q)
  const float* dlse;  // likewise; or null
  int num_heads, head_dim_v;
  int64_t seqlen_q;
  Stats stats;
  float* delta_of_rows;  // delta once more as (batch_size, num_heads, seqlen_q); or null
  Scores scores;
  DqAccum dq_accum;    // set to zero; none where dq is ordered
  uint32_t* dq_turns;  // (num_dq_turns), likewise; or null
  int64_t num_dq_turns;
};

template <typename Stats>
struct TabledBwdStatsParams : BwdStatsParamsOf<ScoreSource, Stats> {
  static constexpr int kMaxRuns = WorkTable::kMaxSegments;

  int num_runs;
  QueryRun runs[kMaxRuns];
};

using BwdStatsKernelParams = TabledBwdStatsParams<QueryStats>;

struct Fp32BwdStatsKernelParams : TabledBwdStatsParams<Fp32QueryStats> {
  const float *q_scales, *dout_scales;  // (num_sequences, num_heads, seqlen_q)
  int q_batch_step, dout_batch_step;    // 1, or 0 where one sequence serves the whole batch
};

struct ListedBwdStatsKernelParams : BwdStatsParamsOf<ListedScoreSource, QueryStats> {
  const ListedQueries* queries;  // (num_tiles)
  uint32_t* next_item;           // of KeyList, set to zero
  void* dq;                      // (batch_size, seqlen_q, num_heads, head_dim), set to zero where nobody computes it
  Strides dq_strides;
  int head_dim;
};

// head_dim, head_dim_v: of the tensors, up to that of the kernel. *_batch_step: 1, or 0 where one sequence serves the
// whole batch. Maps: tensor_map.h.
template <typename Stats, typename Table = KeyWorkTable>
struct DkDvParamsOf {
  CUtensorMap q, dout;  // (batch_size, seqlen_q, num_heads, head_dim or head_dim_v)
  CUtensorMap k, v;     // (batch_size, seqlen_k, num_heads, head_dim or head_dim_v)
  int q_batch_step, dout_batch_step, k_batch_step, v_batch_step;
  void* dk;  // (batch_size, seqlen_k, num_heads, head_dim)
  void* dv;  // (batch_size, seqlen_k, num_heads, head_dim_v)
  Strides dk_strides, dv_strides;
  Stats stats;
  DqAccum dq_accum;  // none where another kernel computes dq
  int head_dim, head_dim_v;
  const uint32_t* key_mask_bits;  // (num_sequences, num_words): mask.h; null without a mask
  int key_mask_step;
  float softmax_scale, softmax_scale_log2;
  Table table;
};

using DkDvKernelParams = DkDvParamsOf<QueryStats>;

struct Fp32DkDvKernelParams : DkDvParamsOf<Fp32QueryStats> {
  Fp32Inputs inputs;
};

struct ListedDkDvKernelParams : DkDvParamsOf<QueryStats, KeyList> {
  void* dq;  // (batch_size, seqlen_q, num_heads, head_dim); none where another kernel computes it
  Strides dq_strides;
  float* own_sums;  // (blocks, num_slots, kQueryTileRows * head_dim of the kernel)
  int num_slots;
};

struct DqAccumParams {
  DqAccum dq_accum;
  bool leaves_zeros;  // where sums were
  void* dq;           // (batch_size, seqlen_q, num_heads, head_dim)
  Strides dq_strides;
  float softmax_scale;
  int num_heads, head_dim, num_tiles;
};

struct DqAccumKernelParams : DqAccumParams {
  int num_runs;
  QueryRun runs[BwdStatsKernelParams::kMaxRuns];
  int num_accum_runs;
  DqAccumRun accum_runs[KeyWorkTable::kMaxRanges];  // of one tile, all are added
};

struct ListedDqAccumKernelParams : DqAccumParams {
  const ListedQueries* queries;  // (num_tiles of all queries)
  const int* shared_tiles;       // (num_tiles), which of them have sums that blocks share
};

// A WorkTable whose items are never split; it selects the cheaper look-up in work_items.cuh.
struct UncutWorkTable : WorkTable {};

struct DqKernelParams {
  CUtensorMap q, dout;  // (batch_size, seqlen_q, num_heads, head_dim or head_dim_v)
  CUtensorMap k, v;     // (batch_size, seqlen_k, num_heads, head_dim or head_dim_v)
  int q_batch_step, dout_batch_step, k_batch_step, v_batch_step;
  void* dq;  // (batch_size, seqlen_q, num_heads, head_dim)
  Strides dq_strides;
  const float* lse;                // (batch_size, num_heads, seqlen_q)
  const float* delta;              // likewise
  const RowReference* references;  // likewise
  int64_t seqlen_q;
  int head_dim, head_dim_v;
  const uint32_t* key_mask_bits;  // (num_sequences, num_words): mask.h; null without a mask
  int key_mask_step;
  float softmax_scale, softmax_scale_log2;
  UncutWorkTable table;
};

struct Fp32DqKernelParams : DqKernelParams {
  Fp32Inputs inputs;
};

// Larger parameters cost the launch time; newer drivers allow 32 KiB.
static_assert(sizeof(BwdStatsKernelParams) <= 4096 && sizeof(Fp32BwdStatsKernelParams) <= 4096 &&
                  sizeof(DqAccumKernelParams) <= 4096 && sizeof(DkDvKernelParams) <= 4096 &&
                  sizeof(Fp32DkDvKernelParams) <= 4096 && sizeof(DqKernelParams) <= 4096 &&
                  sizeof(Fp32DqKernelParams) <= 4096,
              "kernel parameters beyond 4096 bytes cost the launch time");

}  // namespace mixed_attention::cuda::hopper
