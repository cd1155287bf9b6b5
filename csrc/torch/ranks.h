// Rows that are spread over ranks: brought together, and sums of them taken apart, by torch's functional collectives.
// Without derivatives; csrc/torch/gather.h has these. Without autocast, which would promote what is joined, and refuses
// numbers of 16 bits that are not its own.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace mixed_attention {

// Where the rows of some groups lie. On a rank its rows of all groups lie behind one another; in the whole, groups do,
// and in each the rows of the ranks in order.
struct Shards {
  // group: name of the process group. sizes: of every group, its rows on each rank.
  Shards(std::string group, int64_t rank, bool share_a_host, std::vector<std::vector<int64_t>> sizes);

  std::string group;
  int64_t rank;
  bool share_a_host;  // whether all ranks run on one host
  std::vector<std::vector<int64_t>> sizes;
  std::vector<int64_t> totals;  // rows of all groups on each rank
  int64_t most, whole;          // the most of them, and their sum

  int64_t num_ranks() const { return static_cast<int64_t>(totals.size()); }
  int64_t here() const { return totals[rank]; }
};

// A collective that runs, and what is made of its result. Tensors that travel together are `parts`.
struct InFlight {
  at::Tensor received;                     // not there before `wait`; undefined where nothing travels
  std::vector<std::vector<int64_t>> rows;  // the shape of a row of each part
  at::TensorOptions options;               // of what is made
};

// Starts to bring the rows of all ranks together. parts: (shards.here(), ...) each, of one dtype, as pieces that lie
// behind one another.
InFlight start_gather(const std::vector<std::vector<at::Tensor>>& parts, const Shards& shards);

// Waits for it. Returns (shards.whole, ...) for each part.
std::vector<at::Tensor> finish_gather(const InFlight& gather, const Shards& shards);

// Starts to add up the rows of the whole over all ranks, each rank its own. parts: (shards.whole, ...) each. dtype: of
// the sums; parts of 16 bits, or those of fp32 that these were rounded from.
InFlight start_sums(at::TensorList parts, const Shards& shards, at::ScalarType dtype);

// Waits for it. Returns the sums (shards.here(), ...) for each part, which were made in fp32 at least and rounded once.
std::vector<at::Tensor> finish_sums(const InFlight& sums, const Shards& shards);
// The same of a single part, to where somebody wants the sums.
void finish_sums_into(const InFlight& sums, const Shards& shards, const at::Tensor& result);

}  // namespace mixed_attention
