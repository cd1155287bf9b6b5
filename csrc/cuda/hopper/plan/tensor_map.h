// Descriptions of strided tensors for TMA.
#pragma once

#include <cuda.h>

#include "params.h"

namespace mixed_attention::cuda::hopper {

// A (batch_size, seqlen, num_heads, head_dim) tensor. Maps are of 16-bit elements alone.
struct TensorView {
  const void* data;
  DType dtype;
  int64_t batch_size, seqlen, num_heads, head_dim;
  Strides strides;
};

// A tensor of a call, of so many rows and columns.
inline TensorView view_of(const AttentionParams& params, const void* data, int64_t seqlen, int64_t head_dim,
                          const Strides& strides) {
  return {data, params.dtype, params.batch_size, seqlen, params.num_heads, head_dim, strides};
}

// How far the coordinate of a map moves from one sequence to the next: not at all where one serves all.
inline int batch_step(const Strides& strides) { return strides.batch == 0 ? 0 : 1; }

// True if TMA can read a tensor: 16-byte alignment, sizes within its limits, no row that stands for many.
bool can_map(const TensorView& tensor);

// True if rows can leave in 16-byte stores.
bool can_store(const void* data, const Strides& strides, int64_t element_bytes = 2);

// Tiles of (block_rows, columns) at (column, row, head, batch), with the swizzle of that width: 64 or 32 columns. Rows
// past the end of the tensor and columns past head_dim read as zeros.
CUtensorMap make_tile_map(const TensorView& tensor, int block_rows, int columns = 64);

// Tiles of (block_rows, columns) of which only the first num_rows are read, the others are zeros, so that a tile may
// end inside the tensor without seeing what follows. Its coordinates are (column, block_rows - num_rows, row +
// num_rows, head, batch).
//
// The rows have two dimensions of the same stride, and the base lies block_rows before the tensor: the sum of both
// coordinates is where a row lies, while the first, of extent block_rows, says whether it is read.
CUtensorMap make_clipped_tile_map(const TensorView& tensor, int block_rows, int columns = 64);

}  // namespace mixed_attention::cuda::hopper
