// Builds the forward kernel's parameters and launches it.
#pragma once

#include <algorithm>
#include <numbers>

#include "cuda/cuda_check.h"
#include "cuda/device.h"
#include "cuda/hopper/fwd_kernel.cuh"
#include "cuda/hopper/fwd_launch.h"
#include "cuda/hopper/tensor_map.h"

namespace mixed_attention::cuda::hopper {

template <typename Config>
FwdKernelParams make_fwd_kernel_params(const FwdParams& params) {
  const FwdTensors tensors = fwd_tensors(params);
  return {make_tile_map(tensors.q, Config::kBlockM, Config::kSlabColumns),
          make_clipped_tile_map(tensors.k, Config::kBlockN, Config::kSlabColumns),
          make_clipped_tile_map(tensors.v, Config::kBlockN, Config::kSlabColumns),
          params.q_strides.batch == 0 ? 0 : 1,
          params.k_strides.batch == 0 ? 0 : 1,
          params.v_strides.batch == 0 ? 0 : 1,
          params.out,
          static_cast<float*>(params.lse),
          params.out_strides,
          params.seqlen_q,
          static_cast<int>(params.head_dim),
          static_cast<float>(params.softmax_scale),
          static_cast<float>(params.softmax_scale * std::numbers::log2e),
          make_work_table(params, Config::kBlockM, Config::kBlockN)};
}

template <typename Element, int kHeadDim>
void launch_fwd(const FwdParams& params) {
  using Config = FwdConfig<Element, kHeadDim>;
  constexpr int kSharedBytes = sizeof(FwdSharedStorage<Config>);
  static_assert(kSharedBytes <= 227 * 1024);
  const FwdKernelParams kernel_params = make_fwd_kernel_params<Config>(params);
  if (kernel_params.table.num_items == 0) return;

  const auto kernel = hopper_attention_fwd_kernel<Config>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute(hopper_attention_fwd_kernel)");
  const int num_blocks = std::min(kernel_params.table.num_items, num_multiprocessors(params.device));
  kernel<<<num_blocks, Config::kThreads, kSharedBytes, static_cast<cudaStream_t>(params.stream)>>>(kernel_params);
  check(cudaGetLastError(), "launch of hopper_attention_fwd_kernel");
}

}  // namespace mixed_attention::cuda::hopper
