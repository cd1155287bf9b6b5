// What instantiations.txt calls the numbers of a kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mixed_attention::cuda::hopper {

// kLimbs: half_limbs.h; numbers of 16 bits are a single one.
template <typename Element_, int kLimbs_>
struct KernelDtype {
  using Element = Element_;
  static constexpr int kLimbs = kLimbs_;
};

using bf16 = KernelDtype<__nv_bfloat16, 1>;
using fp16 = KernelDtype<__half, 1>;
using fp32 = KernelDtype<float, 2>;
using tf32 = KernelDtype<float, 1>;

}  // namespace mixed_attention::cuda::hopper
