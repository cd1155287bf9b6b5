// What a thread block works on, with which the backward's kernels over tiles begin: its item, the rows of tensors that
// belong to the item's batch_head, and the mask of its sequence. The forward writes it out, as this struct costs it
// registers: at D96 in bf16 48 bytes of spills for sm_90 instead of 8.
#pragma once

#include "cuda/portable/tile.cuh"
#include "cuda/portable/tile_iterator.cuh"

namespace mixed_attention::cuda::portable {

// Arguments: those of the kernel, with its params and its table.
template <class Element, class Arguments>
struct BlockContext {
  const Arguments& args;
  WorkView work;
  WorkItem item;

  // tile_rows: how many rows a tile of the table has.
  __device__ BlockContext(const Arguments& args, const InlineWork& in_parameters, int tile_rows)
      : args(args),
        work(view(args.work, in_parameters)),
        item(locate(args.work, work, blockIdx.x, tile_rows, args.params.num_heads)) {}

  // (seqlen_k), or null.
  __device__ const bool* mask() const {
    const bool* mask = args.params.key_padding_mask;
    return mask == nullptr ? nullptr : mask + item.batch * args.params.key_padding_mask_batch_stride;
  }

  __device__ GlobalRows<Element> rows(const void* tensor, const Strides& strides, int64_t num_cols) const {
    return rows_of<Element>(tensor, strides, item.batch, item.head, num_cols, args.aligned);
  }

  // NOTE: a kernel computes this once, behind its rows and its mask: ptxas finds the fewest registers for that order.
  __device__ int64_t batch_head() const { return static_cast<int64_t>(item.batch) * args.params.num_heads + item.head; }
  // The number of that batch_head among those of all splits. It is computed where it is needed, as registers that hold
  // it through a loop would be missing there.
  __device__ int64_t split_batch_head(int64_t batch_head) const {
    return batch_head + static_cast<int64_t>(item.split) * args.params.batch_size * args.params.num_heads;
  }
};

}  // namespace mixed_attention::cuda::portable
