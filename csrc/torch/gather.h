// Rows of all ranks as nodes of the graph.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "torch/ranks.h"
#include "torch/tokens.h"

namespace mixed_attention {

// Brings tokens of all ranks together, those of several tensors at once; their gradients are summed over the ranks.
//
// parts: (batch_size, seqlen, ...) each, of one dtype. tokens: those that are brought together, shards.here() of them;
// all without. Returns (batch_size, shards.whole, ...) for each.
std::vector<at::Tensor> gather_tokens(const std::vector<at::Tensor>& parts, const std::optional<Ranges>& tokens,
                                      const std::shared_ptr<Shards>& shards);

// Keys and values of some tokens as a projection has made them.
struct LocalKeys {
  std::vector<int64_t> shape;    // batch_size, seqlen, 2, num_heads, head_dim
  std::optional<Ranges> tokens;  // which of those that frequencies are given for, if not all
};

// Those of this rank, on their way to all ranks.
class TravellingKeys {
 public:
  // Rotates the keys where they lie and starts to gather them with the values. What is made before `wait` overlaps with
  // the gather, and its gradients with the sums. pairs: frequencies as kernels take them.
  TravellingKeys(const at::Tensor& buffer, const std::optional<at::Tensor>& pairs, const LocalKeys& keys,
                 std::shared_ptr<Shards> shards);

  // (batch_size, shards.whole, 2, num_heads, head_dim).
  at::Tensor wait();

  // The buffer after rotation, as a part of the graph.
  const at::Tensor& here() const { return here_; }

  struct Transfer;

 private:
  std::shared_ptr<Transfer> transfer_;
  at::Tensor here_;
};

// Derivatives of the two by functions that have derivatives themselves: sums over ranks of the rows of a whole, and
// gradients of a buffer given those after rotation.
struct GatherComposites {
  std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>& wholes, const std::shared_ptr<Shards>&)> sums;
  std::function<at::Tensor(const at::Tensor& grad, const at::Tensor& pairs, const std::optional<Ranges>& tokens,
                           const std::vector<int64_t>& shape)>
      rotate_back;
};
void set_gather_composites(GatherComposites composites);

}  // namespace mixed_attention
