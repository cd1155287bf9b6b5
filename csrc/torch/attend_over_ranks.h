// Attention of this rank's queries to the keys of all ranks, over packed buffers, as one node of the graph.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "torch/attend_in_place.h"
#include "torch/ranks.h"

namespace mixed_attention {

struct SpreadCall {
  PackedCall here;       // the buffers of this rank: one of q, k and v, or one of q and one of k and v
  PackedCall attention;  // of the queries of this rank, and one buffer of the keys and values of all
  std::shared_ptr<Shards> shards;
};

// Rotates the buffers where they lie, those that have frequencies (batch_size or 1, tokens, head_dim / 2, 2), brings
// keys and values of all ranks together, and attends. Where queries have a buffer of their own it is rotated while keys
// and values travel, and so is its gradient while their sums do.
//
// Returns the output (batch_size, seqlen_q, num_heads * head_dim), and the rotated buffers as parts of the graph.
std::vector<at::Tensor> attend_over_ranks(const std::vector<at::Tensor>& buffers, const OptionalTensors& freqs,
                                          const std::optional<at::Tensor>& dropout_seed, const SpreadCall& call);

// The gradients of the buffers by functions that have derivatives themselves. buffers: after rotation.
using SpreadComposite = std::function<std::vector<at::Tensor>(
    const std::vector<at::Tensor>& buffers, const OptionalTensors& freqs, const std::optional<at::Tensor>& dropout_seed,
    const SpreadCall& call, const at::Tensor& out, const at::Tensor& lse, const at::Tensor& dout,
    const OptionalTensors& drotated)>;
void set_spread_composite(SpreadComposite composite);

}  // namespace mixed_attention
