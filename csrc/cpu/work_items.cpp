#include "cpu/work_items.h"

#include <algorithm>
#include <thread>

namespace mixed_attention::cpu {

int64_t rows_of_item(const AttentionParams& params, int64_t most_rows) {
  const int64_t num_rows = params.batch_size * params.num_heads * params.seqlen_q;
  int64_t rows = most_rows;
  while (rows > kFwdBlockM / 4 && num_rows < 4 * rows * params.num_threads) rows /= 2;
  return rows;
}

std::vector<FwdItem> fwd_items(const AttentionParams& params, int64_t block) {
  std::vector<FwdItem> items;
  for (int64_t batch = 0; batch < params.batch_size; ++batch) {
    for (int64_t head = 0; head < params.num_heads; ++head) {
      for (const QuerySegment& segment : params.schedule->query_segments) {
        int64_t num_keys = 0;
        for (const Range& keys : segment.keys) num_keys += keys.size();
        for (int64_t begin = segment.rows.begin; begin < segment.rows.end; begin += block) {
          const Range rows{begin, std::min(begin + block, segment.rows.end)};
          items.push_back({batch, head, rows, segment.keys.data(), static_cast<int64_t>(segment.keys.size()),
                           rows.size() * num_keys});
        }
      }
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const FwdItem& a, const FwdItem& b) { return a.cost > b.cost; });
  return items;
}

FwdWork work_of(const AttentionParams& params, const std::vector<FwdItem>& items) {
  FwdWork work{0, 0};
  for (const FwdItem& item : items) {
    work.operations += item.cost * (params.head_dim + params.head_dim_v);
    work.rows = std::max(work.rows, item.rows.size());
  }
  return work;
}

VisitedTiles visit_tiles_of_keys(const Schedule& schedule, int64_t keys_of_item) {
  const auto& segments = schedule.query_segments;
  VisitedTiles plan;
  std::vector<int64_t> first_tile;  // by query segment
  for (const QuerySegment& segment : segments) {
    first_tile.push_back(plan.tiles_per_head);
    plan.tiles_per_head += ceil_div(segment.rows.size(), kBwdBlockM);
  }
  std::vector<int> rank(segments.size(), 0);
  const auto segment_of = [&](const Range& queries) {
    const auto begins_before = [](const QuerySegment& s, int64_t begin) { return s.rows.begin < begin; };
    return std::lower_bound(segments.begin(), segments.end(), queries.begin, begins_before) - segments.begin();
  };
  for (const KeySegment& keys : schedule.key_segments) {
    for (int64_t begin = keys.rows.begin; begin < keys.rows.end; begin += keys_of_item) {
      plan.tiles.push_back(
          {{begin, std::min(begin + keys_of_item, keys.rows.end)}, plan.visits.size(), keys.readers.size()});
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

void wait_until(const int* progress, int rank) {
  for (int spins = 0; __atomic_load_n(progress, __ATOMIC_ACQUIRE) != rank; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    default: return 2;
  }
}

void zero_rows(const AttentionParams& params, Range rows, void* out, const Strides& strides, int64_t size) {
  const int64_t bytes = element_size(params.dtype);
  for (int64_t batch = 0; batch < params.batch_size; ++batch) {
    for (int64_t head = 0; head < params.num_heads; ++head) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t place = batch * strides.batch + head * strides.head + row * strides.row;
        std::fill_n(static_cast<char*>(out) + place * bytes, size * bytes, 0);
      }
    }
  }
}

namespace {

// The tiles of query rows, as the backward visits them, with a row whose log-sum-exp is large.
template <class Acc>
std::vector<FwdItem> items_to_measure(const AttentionParams& params, const void* all_lse) {
  std::vector<FwdItem> items;
  const Acc* lse = static_cast<const Acc*>(all_lse);
  for (int64_t batch = 0; batch < params.batch_size; ++batch) {
    for (int64_t head = 0; head < params.num_heads; ++head, lse += params.seqlen_q) {
      for (const QuerySegment& segment : params.schedule->query_segments) {
        for (int64_t begin = segment.rows.begin; begin < segment.rows.end; begin += kBwdBlockM) {
          const Range rows{begin, std::min(begin + kBwdBlockM, segment.rows.end)};
          if (std::any_of(lse + rows.begin, lse + rows.end, is_large_lse)) {
            items.push_back({batch, head, rows, segment.keys.data(), static_cast<int64_t>(segment.keys.size()), 0});
          }
        }
      }
    }
  }
  return items;
}

}  // namespace

MeasuredRows measure_rows(const AttentionParams& params, const void* lse, const AttentionKernels& kernels) {
  const std::vector<FwdItem> items =
      params.dtype == DType::kFloat64 ? items_to_measure<double>(params, lse) : items_to_measure<float>(params, lse);
  if (items.empty()) return {};
  const int64_t size = params.batch_size * params.num_heads * params.seqlen_q * accumulator_size(params.dtype);
  MeasuredRows rows{allocate(2 * size)};
  char *row_max = rows.memory.get(), *row_log2_sum = row_max + size;
  rows.row_max = row_max;
  rows.row_log2_sum = row_log2_sum;
  const int64_t num_items = static_cast<int64_t>(items.size()), operations = num_items * kOperationsPerThread;
  for_each_item(params.parallel_for, num_workers(params, num_items, operations), num_items,
                fwd_scratch_size(params, kernels, kBwdBlockM), [&](int64_t index, void* scratch) {
                  kernels.measure(params, items[index], scratch, row_max, row_log2_sum);
                });
  return rows;
}

}  // namespace mixed_attention::cpu
