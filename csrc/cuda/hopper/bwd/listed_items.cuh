// The items of a block that goes through a list of keys. A warp beside the producer takes them from the list, ahead of
// all others, who find them in a ring in shared memory: what it reads in global memory holds nobody up. Blocks take
// units as they come to them, the longest first.
//
// Who signals whom: full by one arrival of the warp that takes items, empty by one arrival of every warp that works on
// them, the producers' among them.
#pragma once

#include <cstdint>

#include "cuda/hopper/bwd/listed_walk.cuh"
#include "cuda/hopper/bwd/params.h"
#include "cuda/hopper/bwd/rare_items.cuh"
#include "cuda/hopper/plan/work_items.cuh"
#include "cuda/hopper/tile/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace mixed_attention::cuda::hopper {

// num_readers: warps that read keys and values; they and two producers work on items.
template <typename SharedStorage>
__device__ inline void init_list_barriers(SharedStorage& shared, int num_readers) {
  init_pipe(shared.items.pipe, 1, num_readers + 2);
  if constexpr (requires { shared.dq_exchange.visits; }) {
    for (ptx::Mbarrier& full : shared.dq_exchange.visits.full) ptx::mbarrier_init(full, 1);
  }
}

// Takes items until there are none, by a warp.
template <typename Config>
__device__ inline void take_items(const ListedDkDvKernelParams& params, ItemRing& items) {
  const KeyList& list = params.table;
  const int lane = threadIdx.x % 32;
  RingUse<kItemStages> use{0};
  const auto hand_out = [&](const ListedItem& item) {
    wait_empty(items.pipe, use);
    if (lane == 0) {
      items.items[use.stage()] = item;
      ptx::mbarrier_arrive(items.pipe.full[use.stage()]);
    }
    __syncwarp();
    ++use.count;
  };

  for (int number = static_cast<int>(blockIdx.x); number < list.num_items;) {
    const UnitOfList unit(list, number);
    // The next one is asked for before this one is gone through, as it takes a while to come.
    if (lane == 0) number = static_cast<int>(gridDim.x + atomicAdd(list.next_item, 1));
    for (int i = unit.begin; i < unit.end; ++i) {
      const ListedKeys keys = list.keys[i];
      bool is_rare = false;
      if constexpr (Config::kSeparatesRareItems) {
        const int64_t first = (int64_t{unit.batch} * list.num_heads + unit.head) * params.stats.num_tiles;
#pragma unroll 4
        for (int tile = keys.first_query + lane; tile < keys.end_query; tile += 32) {
          is_rare |= is_rare_tile(params.stats, first + tile);
        }
        is_rare = __any_sync(0xffffffff, is_rare);
      }
      hand_out({keys.row_begin, keys.row_end, unit.head, unit.batch, keys.num_tiles, keys.first_run,
                keys.is_first * ListedItem::kIsFirst | keys.is_last * ListedItem::kIsLast |
                    int{is_rare} * ListedItem::kIsRare});
    }
    number = __shfl_sync(0xffffffff, number, 0);
  }
  hand_out({.num_tiles = -1});
}

// The items of a block as a warp, or a single thread of one, finds them: for (ListedItems item(shared); item.next();).
class ListedItems {
 public:
  __device__ explicit ListedItems(ItemRing& items) : items_(items) {}

  // kIsThread: for a thread that is alone.
  template <bool kIsThread = false>
  __device__ bool next() {
    if (use_.count > 0) {
      ptx::Mbarrier& empty = items_.pipe.empty[before().stage()];
      if constexpr (kIsThread) {
        ptx::mbarrier_arrive(empty);
      } else {
        sync_and_arrive_as_warp(empty);
      }
    }
    wait_full(items_.pipe, use_);
    ++use_.count;
    num_tiles_ = item().num_tiles;
    // The compiler shall know that all lanes go the same way, and that they count alike.
    if constexpr (!kIsThread) num_tiles_ = __shfl_sync(0xffffffff, num_tiles_, 0);
    return num_tiles_ >= 0;
  }

  __device__ int num_query_tiles() const { return num_tiles_; }

  // Read anew wherever it is wanted, so that nobody holds it in registers.
  __device__ const ListedItem& item() const { return items_.items[before().stage()]; }

 private:
  __device__ RingUse<kItemStages> before() const { return {use_.count - 1}; }

  ItemRing& items_;
  RingUse<kItemStages> use_{0};
  int num_tiles_ = 0;
};

}  // namespace mixed_attention::cuda::hopper
