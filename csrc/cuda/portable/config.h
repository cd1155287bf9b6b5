// Tile sizes of the portable kernels, one row for each padded head_dim, and why.
#pragma once

#include "cuda/portable/arithmetic.h"

namespace mixed_attention::cuda::portable {

// What one thread block owns and what it streams through shared memory.
struct Tile {
  int rows;         // that the block owns: queries (forward, dq) or keys (dk, dv)
  int block_rows;   // of the other side at a time
  int warp_rows;    // 16 or 32 of the owned rows to a warp: 32 reads each streamed operand half as often
  int stages;       // buffers of the streamed side
  int blocks = 2;   // that run at a time on a multiprocessor; also the bound that registers are allocated for
  int sharing = 1;  // warps to the same owned rows: each sums its share of their gradients' columns (dk, dv)

  constexpr int num_warps() const { return rows / warp_rows * sharing; }
  constexpr int num_threads() const { return 32 * num_warps(); }
  // How many of a block's rows a warp of the kernel for dk and dv has the scores of at a time.
  constexpr int score_rows() const { return block_rows / sharing < 32 ? block_rows / sharing : 32; }
};

// Bounds on all tiles: accumulators of a thread within 255 registers with room for operands, and shared memory within
// what the smaller chips of compute capability 8.6, 8.9 and 12.0 give to a block.
constexpr int kMaxSharedBytes = 99 * 1024;

// Registers of a thread, for R rows to a warp: scores R * block_rows / 32, output R * head_dim / 32. At D128 64 keys to
// a block instead of 32 halve what a block costs beside its MMAs.
constexpr Tile fwd_tile(Arithmetic arithmetic, int head_dim) {
  if (is_16_bit(arithmetic)) {
    if (head_dim <= 96) return {128, 64, 32, 2};
    if (head_dim <= 128) return {128, 64, 32, 1};
    return {64, 32, 16, 2};
  }
  if (head_dim <= 32) return {128, 64, 32, 2};
  if (head_dim <= 64) return {128, 32, 32, 2, arithmetic == Arithmetic::kTf32 ? 3 : 2};
  if (head_dim <= 128) return {64, 32, 16, 2};
  return {32, 16, 16, 2};
}

// dk and dv take two accumulators of R * head_dim / sharing / 32 registers, two score tiles of R * score_rows / 32.
// At D128 in 16 bits, two warps of 32 keys with half of the columns each read shared memory two thirds as often as
// warps of 16 keys with all of them, although they hand their scores to each other. 64 queries to a block instead of 32
// halve the barriers, and let a warp take 32 of them for dq, too; with one stage two such blocks fit a multiprocessor
// of 8.0, and the next queries come during dq's MMAs.
constexpr Tile dk_dv_tile(Arithmetic arithmetic, int head_dim) {
  if (is_16_bit(arithmetic)) {
    if (head_dim <= 32) return {128, 32, 32, 2};
    if (head_dim <= 64) return {128, 64, 32, 1};
    if (head_dim <= 128) return {64, 64, 32, 1, 2, 2};
    if (head_dim <= 192) return {64, 16, 16, 2};
    return {64, 16, 16, 1};
  }
  if (head_dim <= 32) return {128, 32, 32, 2};
  if (head_dim <= 64) return {64, 32, 16, 1, 3};
  if (head_dim <= 96) return {64, 16, 16, 2};
  if (head_dim <= 128) return {64, 16, 16, 1};
  if (head_dim <= 192) return {32, 16, 16, 2};
  return {32, 16, 16, 1};
}

// dq takes two score tiles and one accumulator.
constexpr Tile dq_tile(Arithmetic arithmetic, int head_dim) {
  if (is_16_bit(arithmetic) && head_dim <= 64) return {128, 32, 32, 2};
  if (is_16_bit(arithmetic) && head_dim <= 128) return {64, 32, 16, 2};
  return dk_dv_tile(arithmetic, head_dim);
}

// dk and dv together do not fit in registers beyond this: they are computed one after the other.
constexpr bool fuses_dk_dv(int head_dim) { return head_dim <= 128; }

}  // namespace mixed_attention::cuda::portable
