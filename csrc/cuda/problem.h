// What is asked of the CUDA kernels and what they tell of themselves, as plain values.
#pragma once

#include <cstdint>

#include "params.h"

namespace mixed_attention::cuda {

// What decides which family of kernels serves a call. Whether fp32 may be rounded to TF32 does not: every family that
// serves fp32 has kernels for either, and chooses by AttentionParams::allow_tf32.
struct Problem {
  DType dtype;
  int64_t head_dim, head_dim_v;
  int device;
};

// How the device goes about a pass, for people to read.
struct Layout {
  int tile_rows, block_rows;  // that a thread block owns, and that it takes up at a time of the other side
  int num_splits;             // of the walk of a tile
  int64_t num_tiles;          // of all heads and sequences, splits counted singly
  int num_slots;              // tiles that the device works on at a time
  int64_t num_split_tiles;    // whose walk is cut, all or some
};

// Rounds fp32 tensors to 16 bits.
struct CastParams {
  static constexpr int kMostTensors = 8;

  // Elements in a row.
  struct Part {
    const void* from;  // fp32
    void* to;
    int64_t count;
  };

  Part tensors[kMostTensors];
  int num_tensors;
  DType dtype;  // of the results, bf16 or fp16
  void* stream;
};

// Adds up the rows of a matrix of 16 bits, whose rows begin at multiples of 16 bytes and have a multiple of 8 columns.
struct ColumnSumsParams {
  const void* rows;  // (num_rows, num_columns)
  int64_t num_rows, num_columns, row_stride;
  DType dtype;  // of the rows, bf16 or fp16
  float* sums;  // (num_columns)
  void* stream;
};

}  // namespace mixed_attention::cuda
