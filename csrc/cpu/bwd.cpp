#include <vector>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/work_items.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {

void run_bwd(const BwdParams& params, bool wide_keys) {
  const AttentionKernels& kernels = attention_kernels(params);
  const VisitedTiles plan = visit_tiles_of_keys(*params.schedule, kBwdBlockN);
  const int64_t batch_heads = params.batch_size * params.num_heads;
  const int64_t operations = params.schedule->num_pairs * batch_heads * 3 * (params.head_dim + params.head_dim_v);

  const int64_t num_rows = batch_heads * params.seqlen_q;
  const MeasuredRows measured = measure_rows(params, params.lse, kernels);
  const AlignedMemory delta = allocate(num_rows * accumulator_size(params.dtype));
  for_each_rows(params, operations, [&](int64_t batch, int64_t head, Range rows) {
    kernels.delta(params, batch, head, rows, delta.get());
  });
  for (const Range& rows : plan.unvisited) {
    zero_rows(params, rows, params.dq, params.dq_strides, params.head_dim);
  }

  BwdShared shared{delta.get(), params.dq,           params.dq_strides, measured.row_max, measured.row_log2_sum,
                   nullptr,     plan.tiles_per_head, wait_until,        wide_keys};
  const bool is_16_bit = element_size(params.dtype) == 2;
  const int64_t row = params.num_heads * params.head_dim;
  const AlignedMemory dq_acc = allocate(is_16_bit ? params.batch_size * params.seqlen_q * row * 4 : 0);
  if (is_16_bit) {
    shared.dq_acc = dq_acc.get();
    shared.dq_acc_strides = {params.seqlen_q * row, row, params.head_dim};
  }
  std::vector<int> progress(batch_heads * plan.tiles_per_head, 0);
  shared.progress = progress.data();

  for_each_tile(params, plan, operations, bwd_scratch_size(params, kernels),
                [&](const BwdItem& item, void* scratch) { kernels.bwd(params, shared, item, scratch); });
}

}  // namespace mixed_attention::cpu
