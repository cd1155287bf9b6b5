#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/tasks.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {

void run_bwd(const BwdParams& params) {
  const AttentionKernels& kernels = selected_instruction_set().kernels[static_cast<int>(params.dtype)];
  const BwdPlan plan = make_bwd_plan(*params.schedule, kBwdBlockN);
  const int64_t batch_heads = params.batch_size * params.num_heads;
  const int64_t operations = params.schedule->num_pairs * batch_heads * 3 * (params.head_dim + params.head_dim_v);

  const int64_t num_rows = batch_heads * params.seqlen_q;
  const MeasuredRows measured = measure_rows(params, params.lse, kernels);
  const AlignedMemory delta = allocate(num_rows * accumulator_size(params.dtype));
  constexpr int64_t kDeltaRows = 1024;
  const int64_t delta_tiles = (params.seqlen_q + kDeltaRows - 1) / kDeltaRows;
  const int64_t num_delta_tasks = batch_heads * delta_tiles;
  for_each_task(params.parallel_for, num_workers(params, num_delta_tasks, operations), num_delta_tasks, 0,
                [&](int64_t index, void*) {
                  const int64_t begin = index % delta_tiles * kDeltaRows, batch_head = index / delta_tiles;
                  kernels.delta(params, batch_head / params.num_heads, batch_head % params.num_heads,
                                {begin, std::min(begin + kDeltaRows, params.seqlen_q)}, delta.get());
                });
  for (const Range& rows : plan.unvisited) {
    zero_rows(params, rows, params.dq, params.dq_strides, params.head_dim);
  }

  BwdShared shared{delta.get(),           params.dq, params.dq_strides,   measured.row_max,
                   measured.row_log2_sum, nullptr,   plan.tiles_per_head, wait_until};
  const bool is_16_bit = element_size(params.dtype) == 2;
  const int64_t row = params.num_heads * params.head_dim;
  const AlignedMemory dq_acc = allocate(is_16_bit ? params.batch_size * params.seqlen_q * row * 4 : 0);
  if (is_16_bit) {
    shared.dq_acc = dq_acc.get();
    shared.dq_acc_strides = {params.seqlen_q * row, row, params.head_dim};
  }
  std::vector<int> progress(batch_heads * plan.tiles_per_head, 0);
  shared.progress = progress.data();

  const int64_t num_tiles = static_cast<int64_t>(plan.tiles.size()), num_tasks = batch_heads * num_tiles;
  for_each_task(params.parallel_for, num_workers(params, num_tasks, operations), num_tasks,
                bwd_scratch_size(params, kernels), [&](int64_t index, void* scratch) {
                  const BwdPlan::Tile& tile = plan.tiles[index % num_tiles];
                  const int64_t batch_head = index / num_tiles;
                  const BwdTask task{batch_head / params.num_heads, batch_head % params.num_heads, tile.keys,
                                     plan.visits.data() + tile.first_visit, static_cast<int64_t>(tile.num_visits)};
                  kernels.bwd(params, shared, task, scratch);
                });
}

}  // namespace mixed_attention::cpu
