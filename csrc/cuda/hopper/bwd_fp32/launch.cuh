// Tells bwd/launch.cuh the kernels for fp32.
#pragma once

#include "cuda/hopper/bwd/launch.cuh"
#include "cuda/hopper/bwd_fp32/config.h"
#include "cuda/hopper/bwd_fp32/dk_dv_kernel.cuh"
#include "cuda/hopper/bwd_fp32/dq_kernel.cuh"
#include "cuda/hopper/bwd_fp32/stats_tile.cuh"

namespace mixed_attention::cuda::hopper {

template <int kLimbs>
struct SeparateKernels<float, kFp32BwdHeadDim, kLimbs, false> {
  using Dq = Fp32DqConfig<kLimbs>;
  using DkDv = Fp32DkDvConfig<kLimbs>;
};

template <int kLimbs>
inline constexpr auto kDqKernel<Fp32DqConfig<kLimbs>> = hopper_fp32_dq_kernel<Fp32DqConfig<kLimbs>>;
template <int kLimbs>
inline constexpr auto kDkDvKernel<Fp32DkDvConfig<kLimbs>> = hopper_fp32_dk_dv_kernel<Fp32DkDvConfig<kLimbs>>;

}  // namespace mixed_attention::cuda::hopper
