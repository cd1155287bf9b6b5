// Calls as the host code sees them: sizes, and addresses that nobody follows.
#pragma once

#include "params.h"
#include "problem.h"

namespace walks {

// Tensors and the workspace, far apart; a test reckons with addresses as with numbers.
inline void* address(int64_t tensor) { return reinterpret_cast<void*>((tensor + 1) << 44); }
inline int64_t bytes_between(const void* from, const void* to) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from));
}

inline constexpr int kWorkspace = 9;

// A packed projection, which has queries, keys and values side by side.
inline ma::Strides packed_strides(int64_t seqlen, int64_t num_heads, int64_t head_dim) {
  const int64_t row = 3 * num_heads * head_dim;
  return {seqlen * row, row, head_dim};
}

inline void fill(ma::AttentionParams& params, const Problem& problem, const ma::Schedule& schedule, ma::DType dtype,
                 int64_t head_dim, bool is_masked) {
  params.dtype = dtype;
  params.batch_size = problem.batch_size;
  params.num_heads = problem.num_heads;
  params.seqlen_q = problem.seqlen_q();
  params.seqlen_k = problem.seqlen_k;
  params.head_dim = params.head_dim_v = head_dim;
  params.q = address(0);
  params.k = address(1);
  params.v = address(2);
  params.q_strides = packed_strides(params.seqlen_q, params.num_heads, head_dim);
  params.k_strides = params.v_strides = packed_strides(params.seqlen_k, params.num_heads, head_dim);
  if (is_masked) params.key_padding_mask = static_cast<const bool*>(address(8));
  params.softmax_scale = 1;
  params.schedule = &schedule;
  params.device = kDevice;
  params.workspace = address(kWorkspace);
  multiprocessors_of_device = problem.num_multiprocessors;
}

inline ma::Schedule schedule_of(const Problem& problem) {
  const std::vector<int64_t> flat = problem.flat();
  return ma::make_schedule(flat.data(), flat.size(), problem.seqlen_q(), problem.seqlen_k);
}

}  // namespace walks
