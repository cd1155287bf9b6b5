#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/work_items.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {

void run_jvp(const JvpParams& params) {
  const AttentionKernels& kernels = attention_kernels(params);
  // Sums of tangents take as much of L2 as those of the primal.
  const int64_t most_rows = std::max(kFwdBlockM / (1 + params.tangents.count), kFwdBlockM / 4);
  const std::vector<FwdItem> items = fwd_items(params, rows_of_item(params, most_rows));
  const FwdWork work = work_of(params, items);
  const MeasuredRows measured = params.lse_is_known ? measure_rows(params, params.lse, kernels) : MeasuredRows{};
  const int64_t num_items = static_cast<int64_t>(items.size());
  for_each_item(params.parallel_for, num_workers(params, num_items, 2 * work.operations), num_items,
                jvp_scratch_size(params, kernels, work.rows), [&](int64_t index, void* scratch) {
                  kernels.jvp(params, items[index], measured.row_max, measured.row_log2_sum, scratch);
                });
}

}  // namespace mixed_attention::cpu
