#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/workers.h"

namespace mixed_attention::cpu {
namespace {

void wait_until(const int* progress, int rank) {
  for (int spins = 0; __atomic_load_n(progress, __ATOMIC_ACQUIRE) != rank; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

// One head's tiles of keys with their visits; the same for every batch and head.
struct BwdPlan {
  struct Tile {
    Range keys;
    size_t first_visit, num_visits;
  };
  std::vector<Tile> tiles;
  std::vector<Visit> visits;
  std::vector<Range> unvisited;  // query rows without keys
  int64_t tiles_per_head = 0;    // query tiles
};

BwdPlan make_plan(const Schedule& schedule) {
  const auto& segments = schedule.query_segments;
  BwdPlan plan;
  std::vector<int64_t> first_tile;  // by query segment
  for (const QuerySegment& segment : segments) {
    first_tile.push_back(plan.tiles_per_head);
    plan.tiles_per_head += (segment.rows.size() + kBwdBlockM - 1) / kBwdBlockM;
  }
  std::vector<int> rank(segments.size(), 0);
  const auto segment_of = [&](const Range& queries) {
    const auto begins_before = [](const QuerySegment& s, int64_t begin) { return s.rows.begin < begin; };
    return std::lower_bound(segments.begin(), segments.end(), queries.begin, begins_before) - segments.begin();
  };
  for (const KeySegment& keys : schedule.key_segments) {
    for (int64_t begin = keys.rows.begin; begin < keys.rows.end; begin += kBwdBlockN) {
      plan.tiles.push_back(
          {{begin, std::min(begin + kBwdBlockN, keys.rows.end)}, plan.visits.size(), keys.readers.size()});
      for (const Reader& reader : keys.readers) {
        const auto segment = segment_of(reader.queries);
        plan.visits.push_back({reader.queries, reader.range_index, reader.range_offset + begin - keys.rows.begin,
                               rank[segment]++, false, first_tile[segment]});
      }
    }
  }
  for (Visit& visit : plan.visits) {
    const auto segment = segment_of(visit.queries);
    visit.is_last = visit.rank + 1 == rank[segment];
  }
  for (size_t i = 0; i < segments.size(); ++i) {
    if (rank[i] == 0) plan.unvisited.push_back(segments[i].rows);
  }
  return plan;
}

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    default: return 2;
  }
}

void zero_rows(const BwdParams& params, Range rows) {
  const int64_t size = element_size(params.dtype);
  for (int64_t batch = 0; batch < params.batch_size; ++batch) {
    for (int64_t head = 0; head < params.num_heads; ++head) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const Strides& strides = params.dq_strides;
        char* out =
            static_cast<char*>(params.dq) + (batch * strides.batch + head * strides.head + row * strides.row) * size;
        std::fill_n(out, params.head_dim * size, 0);
      }
    }
  }
}

// The tiles of query rows, as the backward visits them, with a row whose log-sum-exp is large.
template <class Acc>
std::vector<FwdTask> tasks_to_measure(const BwdParams& params) {
  std::vector<FwdTask> tasks;
  const Acc* lse = static_cast<const Acc*>(params.lse);
  for (int64_t batch = 0; batch < params.batch_size; ++batch) {
    for (int64_t head = 0; head < params.num_heads; ++head, lse += params.seqlen_q) {
      for (const QuerySegment& segment : params.schedule->query_segments) {
        for (int64_t begin = segment.rows.begin; begin < segment.rows.end; begin += kBwdBlockM) {
          const Range rows{begin, std::min(begin + kBwdBlockM, segment.rows.end)};
          if (std::any_of(lse + rows.begin, lse + rows.end, is_large_lse)) {
            tasks.push_back({batch, head, rows, segment.keys.data(), static_cast<int64_t>(segment.keys.size()), 0});
          }
        }
      }
    }
  }
  return tasks;
}

// What weights of rows with a large log-sum-exp are relative to: for each row of a call a maximum, then for each the
// logarithm of a sum. Only these are written; nothing is there without such rows.
AlignedMemory measure_rows(const BwdParams& params, const AttentionKernels& kernels, int64_t num_rows) {
  const std::vector<FwdTask> tasks =
      params.dtype == DType::kFloat64 ? tasks_to_measure<double>(params) : tasks_to_measure<float>(params);
  if (tasks.empty()) return nullptr;
  const int64_t size = num_rows * accumulator_size(params.dtype);
  AlignedMemory rows = allocate(2 * size);
  const int64_t num_tasks = static_cast<int64_t>(tasks.size()), operations = num_tasks * kOperationsPerThread;
  for_each_task(params.parallel_for, num_workers(params, num_tasks, operations), num_tasks,
                fwd_scratch_size(params, kernels, kBwdBlockM), [&](int64_t index, void* scratch) {
                  kernels.measure(params, tasks[index], scratch, rows.get(), rows.get() + size);
                });
  return rows;
}

}  // namespace

void run_bwd(const BwdParams& params) {
  const AttentionKernels& kernels = selected_instruction_set().kernels[static_cast<int>(params.dtype)];
  const BwdPlan plan = make_plan(*params.schedule);
  const int64_t batch_heads = params.batch_size * params.num_heads;
  const int64_t operations = params.schedule->num_pairs * batch_heads * 3 * (params.head_dim + params.head_dim_v);

  const int64_t num_rows = batch_heads * params.seqlen_q;
  const AlignedMemory measured = measure_rows(params, kernels, num_rows);
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
  for (const Range& rows : plan.unvisited) zero_rows(params, rows);

  BwdShared shared{delta.get(), params.dq, params.dq_strides,   nullptr,
                   nullptr,     nullptr,   plan.tiles_per_head, wait_until};
  if (measured) {
    shared.row_max = measured.get();
    shared.row_log2_sum = measured.get() + num_rows * accumulator_size(params.dtype);
  }
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
