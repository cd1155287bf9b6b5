#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <limits>
#include <string>

#include "cuda/cuda_check.h"
#include "cuda/device.h"
#include "cuda/hopper/bwd_config.h"
#include "cuda/hopper/bwd_launch.h"
#include "cuda/hopper/fp32_bwd_launch.h"
#include "cuda/hopper/key_work_table.h"
#include "cuda/hopper/launch.h"
#include "cuda/hopper/work_table.h"
#include "cuda/scratch.h"

namespace mixed_attention::cuda::hopper {
namespace {

// Of the kernels that serve a call.
int kernel_head_dim(const BwdParams& params) {
  return with_bwd_head_dim(params.head_dim, []<int kHeadDim>() { return kHeadDim; });
}

// Floats of a statistic by tiles. Every query segment may end in a tile that is filled up.
int64_t size_by_tiles(const BwdParams& params) {
  return params.batch_size * params.num_heads * num_query_tiles(make_query_runs(*params.schedule)) * kQueryTileRows;
}

// Whether one kernel takes less time than two, with seven products instead of five: where keys are many and queries
// few, blocks would wait for their turns. Nor may the sums of a query tile, one for each key segment that it reads,
// take more than twice the memory that they take where they come in any order.
bool can_take_turns(const BwdParams& params) {
  const std::vector<QueryRun> runs = make_query_runs(*params.schedule);
  if (num_reader_tiles(*params.schedule) > 2 * num_query_tiles(runs)) return false;
  const int block_n = key_tile_rows(params.head_dim);
  const KeyWorkTable table = make_key_work_table(params, runs, block_n);
  const int num_blocks = num_multiprocessors(params.device);
  return 5 * int64_t{steps_of_longest_block(table, block_n, num_blocks, 1, true)} <=
         7 * int64_t{steps_of_longest_block(table, block_n, num_blocks, 1, false)};
}

int64_t num_rows(const BwdParams& params) { return params.batch_size * params.num_heads * params.seqlen_q; }

// Of q, and of whatever has its shape.
int64_t num_elements(const BwdParams& params) { return num_rows(params) * params.head_dim; }

// About how long the kernel of all gradients takes, in steps of a query tile, with the queries of a key tile split over
// so many blocks.
int num_steps(const BwdParams& params, const std::vector<QueryRun>& runs, int splits) {
  const int block_n = key_tile_rows(params.head_dim);
  const KeyWorkTable table = make_key_work_table(params, runs, block_n);
  const int num_blocks = num_multiprocessors(params.device) / splits;
  return steps_of_longest_block(table, block_n, num_blocks, splits, params.deterministic);
}

// Two shares where sums of dq find spare memory, which is half of what all of them take, and where they cost hardly any
// time: rounds of blocks are as many, and so long that two launches more do not count.
std::vector<BwdShare> make_shares(const BwdParams& params, const std::vector<QueryRun>& runs) {
  const int64_t size = params.batch_size == 1 ? params.num_heads : params.batch_size;
  const BwdShare all{0, size}, first{0, (size + 1) / 2}, second{first.count, size - first.count};
  const auto steps_of = [&](const BwdShare& share) {
    const BwdParams part = params_of(share, params);
    return std::min(num_steps(part, runs, 1), num_steps(part, runs, 2));
  };
  constexpr int kStepsOfShare = 8;
  if (params.spare_out == nullptr || params.deterministic || params.key_padding_mask != nullptr || size < 2) {
    return {all};
  }
  const int allowed = steps_of(all) + steps_of(all) / 100;
  const bool is_long = allowed >= 100 * kStepsOfShare;
  return is_long && steps_of(first) + steps_of(second) + kStepsOfShare <= allowed ? std::vector{first, second}
                                                                                  : std::vector{all};
}

// largest: of the shares that they serve.
DqSums take_dq_sums(const BwdParams& params, const BwdShare& largest, const std::vector<QueryRun>& runs,
                    Scratch& scratch) {
  const BwdParams served = params_of(largest, params);
  const int64_t num_tiles = params.deterministic ? num_reader_tiles(*params.schedule) : num_query_tiles(runs);
  const int64_t num_all = served.batch_size * served.num_heads * num_tiles;
  const int64_t tile_floats = kQueryTileRows * kernel_head_dim(params);
  DqSums sums{};
  sums.num_tiles = static_cast<int>(num_tiles);
  sums.spare = static_cast<float*>(params.spare_out);
  const int64_t spare_floats = sums.spare == nullptr ? 0 : num_elements(params) / 2;
  sums.num_spare = std::min(num_all, spare_floats / tile_floats);
  sums.num_others = num_all - sums.num_spare;
  sums.others = scratch.take<float>(sums.num_others * tile_floats);
  if (params.deterministic) sums.turns = scratch.take<uint32_t>(num_all);
  return sums;
}

// The kernel for dq reads all keys and values, the one for dk and dv all queries: whichever runs first cannot write
// where the other one reads.
DqTensor take_dq(const BwdParams& params, Scratch& scratch) {
  if (params.dq != params.q) return {params.dq, params.dq_strides};
  const int64_t row = params.num_heads * params.head_dim;
  const Strides strides{params.seqlen_q * row, row, params.head_dim};
  return {params.spare_out != nullptr ? params.spare_out : scratch.take<uint16_t>(num_elements(params)), strides};
}

// Whether the rows of dq are in one piece each, and equally far apart.
bool can_move_dq(const BwdParams& params) {
  const Strides& strides = params.dq_strides;
  return (params.num_heads == 1 || strides.head == params.head_dim) &&
         (params.batch_size == 1 || strides.batch == params.seqlen_q * strides.row);
}

}  // namespace

BwdTensors bwd_tensors(const BwdParams& params) {
  const auto view = [&](const void* data, int64_t seqlen, const Strides& strides) {
    return TensorView{data, params.dtype, params.batch_size, seqlen, params.num_heads, params.head_dim, strides};
  };
  return {view(params.q, params.seqlen_q, params.q_strides), view(params.k, params.seqlen_k, params.k_strides),
          view(params.v, params.seqlen_k, params.v_strides), view(params.dout, params.seqlen_q, params.dout_strides)};
}

BwdWorkspace bwd_workspace(const BwdParams& params) {
  Scratch scratch(params.workspace);
  const int64_t size = size_by_tiles(params);
  BwdWorkspace workspace{};
  workspace.lse_log2 = scratch.take<float>(size);
  workspace.delta = scratch.take<float>(size);
  if (adds_dq(params)) {
    const std::vector<QueryRun> runs = make_query_runs(*params.schedule);
    workspace.shares = make_shares(params, runs);
    workspace.dq_sums = take_dq_sums(params, workspace.shares.front(), runs, scratch);
  } else {
    workspace.delta_of_rows = scratch.take<float>(num_rows(params));
    workspace.dq = take_dq(params, scratch);
  }
  if (params.key_padding_mask != nullptr) workspace.masked_keys = plan_masked_keys(params, scratch, true);
  workspace.size = scratch.bytes();
  return workspace;
}

void move_dq(const BwdParams& params, const BwdWorkspace& workspace) {
  if (workspace.dq.data == params.dq) return;
  const size_t row_bytes = params.num_heads * params.head_dim * sizeof(uint16_t);
  check(cudaMemcpy2DAsync(params.dq, params.dq_strides.row * sizeof(uint16_t), workspace.dq.data, row_bytes, row_bytes,
                          params.batch_size * params.seqlen_q, cudaMemcpyDeviceToDevice,
                          static_cast<cudaStream_t>(params.stream)),
        "copy of dq");
}

BwdTensors bwd_tensors(const BwdParams& params, const BwdWorkspace& workspace) {
  BwdTensors tensors = bwd_tensors(params);
  if (params.key_padding_mask != nullptr) {
    tensors.k = masked_view(params, workspace.masked_keys, workspace.masked_keys.keys);
    tensors.v = masked_view(params, workspace.masked_keys, workspace.masked_keys.values);
  }
  return tensors;
}

bool adds_dq(const BwdParams& params) {
  return params.dtype != DType::kFloat32 && can_add_dq(kernel_head_dim(params)) &&
         (!params.deterministic || can_take_turns(params));
}

BwdParams params_of(const BwdShare& share, const BwdParams& params) {
  BwdParams part = params;
  const auto skip = [&](const void* tensor, const Strides& strides) {
    const int64_t step = params.batch_size == 1 ? strides.head : strides.batch;
    return static_cast<const char*>(tensor) + share.first * step * sizeof(uint16_t);
  };
  (params.batch_size == 1 ? part.num_heads : part.batch_size) = share.count;
  part.q = skip(params.q, params.q_strides);
  part.k = skip(params.k, params.k_strides);
  part.v = skip(params.v, params.v_strides);
  part.dout = skip(params.dout, params.dout_strides);
  part.dq = const_cast<char*>(skip(params.dq, params.dq_strides));
  part.dk = const_cast<char*>(skip(params.dk, params.dk_strides));
  part.dv = const_cast<char*>(skip(params.dv, params.dv_strides));
  return part;
}

QueryStats stats_of(const BwdShare& share, const BwdParams& params, const QueryStats& stats) {
  const int64_t num_sequences = share.first * (params.batch_size == 1 ? 1 : params.num_heads);
  const int64_t skipped = num_sequences * stats.num_tiles * kQueryTileRows;
  return {stats.lse_log2 + skipped, stats.delta + skipped, stats.num_tiles};
}

int num_query_splits(const BwdParams& params, const std::vector<QueryRun>& runs) {
  if (!adds_dq(params) || params.key_padding_mask != nullptr) return 1;
  return num_steps(params, runs, 2) < num_steps(params, runs, 1) ? 2 : 1;
}

std::string refusal_bwd(const Problem& problem) {
  if (std::string refusal = refusal_fwd(problem); !refusal.empty()) return refusal;
  if (problem.dtype == DType::kFloat32 && problem.head_dim > kFp32BwdHeadDim) {
    return "head_dim is " + std::to_string(problem.head_dim) + ", above " + std::to_string(kFp32BwdHeadDim);
  }
  return "";
}

bool can_bwd(const BwdParams& params) {
  if (params.dtype == DType::kFloat32) return can_fp32_bwd(params);
  const BwdTensors tensors = bwd_tensors(params);
  // Keys past a range's end get the score -inf, whose weight is zero only under a positive scale.
  return params.softmax_scale > 0 && params.dropout_p == 0 && can_map(tensors.q) && can_map(tensors.k) &&
         can_map(tensors.v) && can_map(tensors.dout) && can_store(params.out, params.out_strides) &&
         can_store(params.dq, params.dq_strides) && can_store(params.dk, params.dk_strides) &&
         can_store(params.dv, params.dv_strides) && fits_work_table(params) && fits_key_work_table(params);
}

// The last kernel that reads keys and values is the one for their gradients: there they are read by those alone who
// overwrite them, after their last use. Gradients of queries reach their place behind it. The kernels for fp32 read
// copies.
bool can_overwrite_inputs(const BwdParams& params) {
  return params.dtype == DType::kFloat32 || adds_dq(params) || can_move_dq(params);
}

size_t bwd_workspace_size(const BwdParams& params) {
  return params.dtype == DType::kFloat32 ? fp32_bwd_workspace(params).size : bwd_workspace(params).size;
}

void run_bwd(const BwdParams& params) {
  if (params.dtype == DType::kFloat32) return launch_fp32_bwd(params);
  with_bwd_head_dim(params.head_dim, [&]<int kHeadDim>() {
    params.dtype == DType::kBFloat16 ? launch_bwd<__nv_bfloat16, kHeadDim>(params)
                                     : launch_bwd<__half, kHeadDim>(params);
  });
}

}  // namespace mixed_attention::cuda::hopper
