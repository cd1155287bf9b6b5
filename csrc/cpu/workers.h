// Work shared among threads: work items are taken in order, each by whoever is free.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "params.h"

namespace mixed_attention::cpu {

struct AlignedDelete {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using AlignedMemory = std::unique_ptr<char[], AlignedDelete>;

inline AlignedMemory allocate(int64_t size) {
  return AlignedMemory(static_cast<char*>(::operator new[](static_cast<size_t>(size), std::align_val_t(64))));
}

// Below this many operations a second thread costs more than it brings.
inline constexpr int64_t kOperationsPerThread = 1 << 20;

template <class Params>
int num_workers(const Params& params, int64_t num_items, int64_t operations) {
  const int64_t useful = std::min(num_items, operations / kOperationsPerThread + 1);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(params.num_threads, useful)));
}

// Calls run(index, scratch) for index = 0 .. num_items-1; an item begins only after all of lower index have begun.
template <class Run>
void for_each_item(ParallelFor parallel_for, int num_workers, int64_t num_items, int64_t scratch_size, Run run) {
  struct Context {
    Run& run;
    int64_t num_items, scratch_size;
    std::atomic<int64_t> next;
    char* scratch;

    void work(int worker) {
      char* own = scratch + worker * scratch_size;
      for (int64_t index; (index = next.fetch_add(1)) < num_items;) run(index, own);
    }
  };
  scratch_size = (scratch_size + 63) / 64 * 64;
  // Allocated before the threads start, so that a failure is an exception of the caller's thread.
  const AlignedMemory scratch = allocate(num_workers * scratch_size);
  Context context{run, num_items, scratch_size, 0, scratch.get()};
  if (num_workers == 1) return context.work(0);
  parallel_for(num_workers, [](int worker, void* context) { static_cast<Context*>(context)->work(worker); }, &context);
}

}  // namespace mixed_attention::cpu
