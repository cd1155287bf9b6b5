#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/work_items.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {

void run_fwd(const FwdParams& params) {
  const AttentionKernels& kernels = attention_kernels(params);
  const std::vector<FwdItem> items = fwd_items(params, rows_of_item(params, kFwdBlockM));
  const FwdWork work = work_of(params, items);
  const int64_t num_items = static_cast<int64_t>(items.size());
  for_each_item(params.parallel_for, num_workers(params, num_items, work.operations), num_items,
                fwd_scratch_size(params, kernels, work.rows),
                [&](int64_t index, void* scratch) { kernels.fwd(params, items[index], scratch); });
}

}  // namespace mixed_attention::cpu
