// The items of a block of the kernel for dk and dv, as those see them who work on their tiles, and the buffers that
// their keys and values are in: of a table, or of a list.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/hopper/bwd/config.h"
#include "cuda/hopper/bwd/listed_items.cuh"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/query_walk.cuh"
#include "cuda/hopper/bwd/rare_items.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/ring.cuh"

namespace mixed_attention::cuda::hopper {

template <typename Config>
using DkDvParams = std::conditional_t<Config::kIsListed, ListedDkDvKernelParams, DkDvKernelParams>;

// Keys and values of a table's items have a single buffer.
template <typename Config, bool kIsListed = Config::kIsListed>
class DkDvItems {
 public:
  using Shared = DkDvSharedStorage<Config>;

  __device__ DkDvItems(const DkDvKernelParams& params, Shared&) : items_(params.table) {}

  __device__ bool next() { return items_.next(); }

  __device__ int num_query_tiles() const { return QueryShare<Config>(items_.tiles()).count; }
  __device__ bool is_read() const { return items_.tiles().num_tiles > 0; }
  __device__ ItemRows rows() const { return {items_.row_begin, items_.tiles().row_end, items_.head, items_.batch}; }

  // True if this thread sees a query with a reference.
  __device__ bool sees_reference(const DkDvKernelParams& params) const {
    return hopper::sees_reference(params.stats, int64_t{items_.batch} * params.table.num_heads + items_.head);
  }

  __device__ void wait_for_keys(Shared& shared) {
    wait_full(shared.kv_pipe, parity_);
    parity_ ^= 1;
  }
  __device__ void sync_and_release_keys(Shared& shared) { sync_and_release(shared.kv_pipe); }
  __device__ int buffer() const { return 0; }

 private:
  KeyItems<Config> items_;
  uint32_t parity_ = 0;
};

template <typename Config>
class DkDvItems<Config, true> {
 public:
  using Shared = DkDvSharedStorage<Config>;

  __device__ DkDvItems(const ListedDkDvKernelParams&, Shared& shared) : items_(shared.items) {}

  __device__ bool next() { return items_.next(); }

  __device__ int num_query_tiles() const { return items_.num_query_tiles(); }
  __device__ bool is_read() const { return num_query_tiles() > 0; }
  __device__ ItemRows rows() const {
    const ListedItem& item = items_.item();
    return {item.row_begin, item.row_end, item.head, item.batch};
  }
  __device__ bool sees_reference(const ListedDkDvKernelParams&) const { return items_.item().is_rare(); }

  __device__ void wait_for_keys(Shared& shared) { wait_full(shared.kv_pipe, use_); }
  __device__ void sync_and_release_keys(Shared& shared) {
    sync_and_release(shared.kv_pipe, use_);
    ++use_.count;
  }
  __device__ int buffer() const { return use_.stage(); }

 private:
  ListedItems items_;
  RingUse<Config::kKeyBuffers> use_{0};
};

}  // namespace mixed_attention::cuda::hopper
