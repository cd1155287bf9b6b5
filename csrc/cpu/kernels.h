// What a work item of the CPU kernels is, and the table of kernels that one instruction set provides. Their lists are
// made here at the baseline instruction set; the kernels see plain pointers, so that no code of a newer instruction
// set can leak into functions shared with older machines.
#pragma once

#include <cstdint>

#include "ceil_div.h"
#include "derivatives_params.h"
#include "params.h"
#include "schedule.h"

namespace mixed_attention::cpu {

// Columns of packed tiles are rounded up to the widest vector: 16 fp32.
inline constexpr int64_t kColumnBlock = 16;

// Forward: queries and keys of a tile. Many queries share the packing of a key tile, and a key tile (K, V) stays in L2.
inline constexpr int64_t kFwdBlockM = 384, kFwdBlockN = 128;
// Backward: four packed tiles of kBwdBlockN keys and two accumulators, four tiles of kBwdBlockM queries.
inline constexpr int64_t kBwdBlockM = 96, kBwdBlockN = 192;

// Up to here what the exponents of weights are relative to, to base 2, may be rounded: weights are off by that
// rounding, which takes eight of their bits at most. Beyond it scores have it subtracted before they are scaled.
inline constexpr double kLargestSoftmaxBase = 256;

// Whether the backward measures anew what the weights of a row are relative to. Not without keys, nor where nobody can.
inline bool is_large_lse(double lse) {
  constexpr double kLargest = kLargestSoftmaxBase * 0.69314718055994530942;
  return lse > kLargest || (lse < -kLargest && lse - lse == 0);
}

// Query rows of one segment against all keys of that segment, for one batch and head.
struct FwdItem {
  int64_t batch, head;
  Range rows;  // at most kFwdBlockM
  const Range* keys;
  int64_t num_key_ranges;
  int64_t cost;  // scores
};

// One reading of the keys of a backward item.
struct Visit {
  Range queries;
  int range_index;
  int64_t range_offset;  // of the item's first key in that range
  int rank;              // how many items add to dq of these queries before this visit
  bool is_last;          // whether this visit completes dq
  int64_t first_tile;    // index of the first query tile, kBwdBlockM rows each, among all of a head
};

// Key rows with everybody who reads them, for one batch and head.
struct BwdItem {
  int64_t batch, head;
  Range keys;  // at most kBwdBlockN
  const Visit* visits;
  int64_t num_visits;
};

// What the backward items of a call share. Acc is float, and double for fp64.
struct BwdShared {
  const void* delta;  // (batch_size, num_heads, seqlen_q) of Acc: row sums of out * dout, less dlse
  void* dq_acc;       // sums of dq in Acc, with the strides below: dq itself, or scratch for 16-bit types
  Strides dq_acc_strides;
  // For rows of large log-sum-exps, (batch_size, num_heads, seqlen_q) of Acc: a score, as the products make it, and
  // log2 of the sum of exp2(scale * (s - max)). Null where there are no such rows.
  const void *row_max, *row_log2_sum;
  int* progress;  // per (batch, head, query tile): visits that have added their part to dq
  int64_t tiles_per_head;
  void (*wait_until)(const int* progress, int rank);
  bool wide_keys;  // whether dk and dv are of Acc, not of the element type
};

// What the items of a backward with tangents share beside that.
struct BwdJvpShared {
  const void* eps;  // (count, batch_size, num_heads, seqlen_q) of Acc: row sums of out * dout_dot, less dlse_dot
  int64_t eps_step;
  void* dq_dot_acc;  // sums of dq_dot in Acc: dq_dot itself, or scratch for 16-bit types; null where it is not wanted
  Strides dq_dot_acc_strides;
  int64_t dq_dot_acc_step;
};

// A kernel for one element type; scratch is 64-byte aligned, of the size that the scratch functions say.
struct AttentionKernels {
  int64_t row_block;    // rows of a register block of the matrix products; row counts of tiles are rounded up to it
  int64_t factor_size;  // bytes of an element as the products read it
  void (*fwd)(const FwdParams&, const FwdItem&, void* scratch);
  void (*measure)(const AttentionParams&, const FwdItem&, void* scratch, void* row_max, void* row_log2_sum);
  void (*delta)(const BwdParams&, int64_t batch, int64_t head, Range rows, void* delta);
  void (*bwd)(const BwdParams&, const BwdShared&, const BwdItem&, void* scratch);
  void (*jvp)(const JvpParams&, const FwdItem&, const void* row_max, const void* row_log2_sum, void* scratch);
  void (*bwd_jvp_rows)(const BwdJvpParams&, int64_t batch, int64_t head, Range rows, void* eps, int64_t eps_step,
                       void* gamma);
  void (*bwd_jvp)(const BwdJvpParams&, const BwdShared&, const BwdJvpShared&, const BwdItem&, void* scratch);
  void (*rope)(const RopeParams&, int64_t batch, Range rows);
  void (*rms_rope)(const RmsRopeParams&, int64_t batch, Range rows);
  void (*rope_jvp)(const RopeJvpParams&, int64_t batch, Range rows);
  void (*rope_backward)(const RopeBwdParams&, int64_t batch, Range rows);  // of all batches if they share frequencies
};

struct InstructionSet {
  const char* name;
  bool (*is_available)();
  AttentionKernels kernels[4];  // by DType
};

extern const InstructionSet kAmx, kAvx512Bf16, kAvx512, kAvx2, kPortable;

// The instruction set of this process: the best that the machine has, or the one that MIXED_ATTENTION_CPU names.
const InstructionSet& selected_instruction_set();

// Its kernels for a call of attention; those of AVX-512 where products of bfloat16 pairs, which know no scale, would
// overflow although the scores do not.
const AttentionKernels& attention_kernels(const AttentionParams& params);

inline int64_t accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// Bytes of scratch that one worker needs. The layouts are in simd/fwd_kernel.h, simd/bwd_kernel.h and those for
// tangents beside them.
// The forward's for items of up to so many rows: what a call of few tokens allocates is time it takes.
inline int64_t fwd_scratch_size(const AttentionParams& p, const AttentionKernels& kernels, int64_t rows) {
  const int64_t d = round_up(p.head_dim, 2 * kColumnBlock), dv = round_up(p.head_dim_v, kColumnBlock);
  const int64_t block = kernels.row_block, padded_rows = round_up(rows, block);
  const int64_t factors = padded_rows * d + kFwdBlockN * (d + dv + block);
  const int64_t sums = padded_rows * (dv + 1 + kColumnBlock) + kFwdBlockN * (block + 1);
  return factors * kernels.factor_size + sums * accumulator_size(p.dtype) + kFwdBlockN * 32 + 1024;
}

inline int64_t bwd_scratch_size(const AttentionParams& p, const AttentionKernels& kernels) {
  const int64_t d = round_up(p.head_dim, kColumnBlock), dv = round_up(p.head_dim_v, kColumnBlock);
  const int64_t keys = kBwdBlockN * (2 * d + dv + d + dv);
  const int64_t queries = kBwdBlockM * (2 * (d + dv) + d + 3 + 2 * kBwdBlockN);
  const int64_t strips = 3 * kernels.row_block * 4 * kColumnBlock;
  return (keys + queries + strips) * accumulator_size(p.dtype) + kBwdBlockN * 32 + 2048;
}

inline int64_t jvp_scratch_size(const JvpParams& p, const AttentionKernels& kernels, int64_t rows) {
  const int64_t d = round_up(p.head_dim, 2 * kColumnBlock), dv = round_up(p.head_dim_v, kColumnBlock);
  const int64_t block = kernels.row_block, padded_rows = round_up(rows, block), count = p.tangents.count;
  const int64_t factors = count * (padded_rows * d + kFwdBlockN * (d + dv)) + 2 * block * kFwdBlockN;
  const int64_t sums =
      count * padded_rows * (dv + 1 + kColumnBlock) + padded_rows + block * (2 * kFwdBlockN + kColumnBlock);
  return fwd_scratch_size(p, kernels, rows) + factors * kernels.factor_size + sums * accumulator_size(p.dtype) + 1024;
}

inline int64_t bwd_jvp_scratch_size(const BwdJvpParams& p, const AttentionKernels& kernels) {
  const int64_t d = round_up(p.head_dim, 2 * kColumnBlock), dv = round_up(p.head_dim_v, 2 * kColumnBlock);
  const int64_t keys = kBwdBlockN * (2 * d + dv);
  const int64_t queries = kBwdBlockM * (d + dv + d + 2 + 3 * kBwdBlockN);
  const int64_t strips = 2 * kernels.row_block * 4 * kColumnBlock;
  return bwd_scratch_size(p, kernels) + p.tangents.count * (keys + queries + strips) * accumulator_size(p.dtype) + 2048;
}

}  // namespace mixed_attention::cpu
