#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {
namespace {

// Rows of a task: as many as share the packing of keys, fewer where threads would have nothing to do. What comes out of
// a row does not depend on its neighbours.
int64_t rows_of_task(const FwdParams& params) {
  const int64_t num_rows = params.batch_size * params.num_heads * params.seqlen_q;
  int64_t rows = kFwdBlockM;
  while (rows > kFwdBlockM / 4 && num_rows < 4 * rows * params.num_threads) rows /= 2;
  return rows;
}

// Tiles of query rows, longest first, so that no thread is left with a long one at the end.
std::vector<FwdTask> fwd_tasks(const FwdParams& params) {
  const int64_t block = rows_of_task(params);
  std::vector<FwdTask> tasks;
  for (int64_t batch = 0; batch < params.batch_size; ++batch) {
    for (int64_t head = 0; head < params.num_heads; ++head) {
      for (const QuerySegment& segment : params.schedule->query_segments) {
        int64_t num_keys = 0;
        for (const Range& keys : segment.keys) num_keys += keys.size();
        for (int64_t begin = segment.rows.begin; begin < segment.rows.end; begin += block) {
          const Range rows{begin, std::min(begin + block, segment.rows.end)};
          tasks.push_back({batch, head, rows, segment.keys.data(), static_cast<int64_t>(segment.keys.size()),
                           rows.size() * num_keys});
        }
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const FwdTask& a, const FwdTask& b) { return a.cost > b.cost; });
  return tasks;
}

}  // namespace

void run_fwd(const FwdParams& params) {
  const AttentionKernels& kernels = selected_instruction_set().kernels[static_cast<int>(params.dtype)];
  const std::vector<FwdTask> tasks = fwd_tasks(params);
  int64_t operations = 0, rows = 0;
  for (const FwdTask& task : tasks) {
    operations += task.cost * (params.head_dim + params.head_dim_v);
    rows = std::max(rows, task.rows.size());
  }
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  for_each_task(params.parallel_for, num_workers(params, num_tasks, operations), num_tasks,
                fwd_scratch_size(params, kernels, rows),
                [&](int64_t index, void* scratch) { kernels.fwd(params, tasks[index], scratch); });
}

}  // namespace mixed_attention::cpu
