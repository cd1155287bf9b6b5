// The items of a block of the kernel for dk and dv as those see them who work on their tiles: of a table, or of a list.
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

template <typename Config>
using DkDvItems = std::conditional_t<Config::kIsListed, ListedItems, KeyItems<Config>>;

// The use of the buffers of keys and values; of a single one, the parity that is waited for.
template <typename Config>
using KeyUse = std::conditional_t<Config::kIsListed, RingUse<Config::kKeyBuffers>, uint32_t>;

template <typename Config>
__device__ inline DkDvItems<Config> make_items(const DkDvParams<Config>& params, DkDvSharedStorage<Config>& shared) {
  if constexpr (Config::kIsListed) {
    return ListedItems(shared.items);
  } else {
    return KeyItems<Config>(params.table);
  }
}

// How many query tiles of an item this block goes through.
template <typename Config>
__device__ inline int num_query_tiles(const KeyItems<Config>& item) {
  return QueryShare<Config>(item.tiles()).count;
}
template <typename Config>
__device__ inline int num_query_tiles(const ListedItems& item) {
  return item.num_query_tiles();
}

template <typename Config>
__device__ inline ItemRows rows_of(const KeyItems<Config>& item) {
  return {item.row_begin, item.tiles().row_end, item.head, item.batch};
}
template <typename Config>
__device__ inline ItemRows rows_of(const ListedItems& item) {
  const ListedItem& keys = item.item();
  return {keys.row_begin, keys.row_end, keys.head, keys.batch};
}

// True if this thread sees a query with a reference among those of the item, or of its batch_head.
template <typename Config>
__device__ inline bool sees_reference(const DkDvKernelParams& params, const KeyItems<Config>& item) {
  return sees_reference(params.stats, int64_t{item.batch} * params.table.num_heads + item.head);
}
template <typename Config>
__device__ inline bool sees_reference(const ListedDkDvKernelParams&, const ListedItems& item) {
  return item.item().is_rare();
}

}  // namespace mixed_attention::cuda::hopper
