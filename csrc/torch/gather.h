// Rows of all ranks as a node of the graph.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "torch/ranks.h"
#include "torch/tokens.h"
#include "torch/unrounded.h"

namespace mixed_attention {

// Brings tokens of all ranks together, those of several tensors at once; their gradients are summed over the ranks.
//
// parts: (batch_size, seqlen, ...) each, of one dtype. tokens: those that are brought together, shards.here() of them;
// all without. Returns (batch_size, shards.whole, ...) for each.
std::vector<at::Tensor> gather_tokens(const std::vector<at::Tensor>& parts, const std::optional<Ranges>& tokens,
                                      const std::shared_ptr<Shards>& shards);

// Where the gradient of what a gather has made may be left unrounded, as that of its output of such a number.
struct UnroundedPlace {
  std::shared_ptr<UnroundedGradients> gradients;  // null where nobody takes it
  uint32_t output = 0;

  // The gradient, rounded from sums that are left there.
  at::Tensor round(const at::Tensor& sums, at::ScalarType dtype) const;
};
UnroundedPlace unrounded_place(const at::Tensor& whole);

// Sums over ranks of the rows of wholes by a function that has derivatives itself: what a second derivative goes
// through.
using SumsComposite =
    std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>& wholes, const std::shared_ptr<Shards>&)>;
void set_sums_composite(SumsComposite composite);

}  // namespace mixed_attention
