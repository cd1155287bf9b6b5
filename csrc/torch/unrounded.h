// Gradients of 16 bits beside the fp32 sums that they were rounded from.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "torch/torch_internals.h"

namespace mixed_attention {

// What a node that makes gradients leaves for the node that gets them, because the engine rounds gradients to the dtype
// of what they are the gradients of. The engine runs neither of the two without the other.
class UnroundedGradients {
 public:
  // gradient: of the getting node's output of that number, rounded from sums.
  void leave(uint32_t output, const at::Tensor& gradient, at::Tensor sums) {
    const std::lock_guard lock(mutex_);
    left_[output] = {gradient, version_of(gradient), std::move(sums)};
  }

  // The sums behind gradients of all outputs. None where a gradient is not the one that was rounded: hooks may have
  // changed it, and other nodes added to it.
  std::optional<std::vector<at::Tensor>> take(const std::vector<at::Tensor>& gradients) {
    const std::lock_guard lock(mutex_);
    const std::map<uint32_t, Left> left = std::exchange(left_, {});
    std::vector<at::Tensor> sums;
    for (uint32_t output = 0; output < gradients.size(); ++output) {
      const auto found = left.find(output);
      if (found == left.end() || !found->second.gradient.is_same(gradients[output]) ||
          found->second.version != version_of(gradients[output])) {
        return {};
      }
      sums.push_back(found->second.sums);
    }
    return sums;
  }

 private:
  struct Left {
    at::Tensor gradient;
    int64_t version;
    at::Tensor sums;
  };

  std::mutex mutex_;  // a graph may be run backward by several threads
  std::map<uint32_t, Left> left_;
};

}  // namespace mixed_attention
