// Why Hopper's kernels leave a call to others, in words of the one who calls. Each is about something else.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/hopper/config.h"
#include "cuda/problem.h"

namespace mixed_attention::cuda::hopper {

constexpr const char* kScaleIsZero = "softmax_scale is zero, or as small in fp32";
constexpr const char* kDropsOut = "there is dropout";
constexpr const char* kMasks = "there is a key_padding_mask";
constexpr const char* kMasksFp32 = "there is a key_padding_mask, and the dtype is fp32";
constexpr const char* kIsNotAligned = "rows of a tensor do not lie at multiples of 16 bytes, or stand for several";
constexpr const char* kPlanIsTooLarge = "the plan has more segments and ranges than fit the parameters of a kernel";
constexpr const char* kWantsSplits = "there are few queries of many keys, whose walks want to be split";

// Why a pass whose kernels have so many columns at most leaves a problem to others; empty where they are enough.
inline std::string refusal_above(const Problem& problem, int64_t most) {
  const int64_t head_dim = widest_head_dim(problem);
  if (head_dim <= most) return "";
  const char* name = head_dim == problem.head_dim ? "head_dim" : "head_dim of v";
  return name + (" is " + std::to_string(head_dim)) + ", above " + std::to_string(most);
}

}  // namespace mixed_attention::cuda::hopper
