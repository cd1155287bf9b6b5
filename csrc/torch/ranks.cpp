#include "torch/ranks.h"

#include <ATen/Functions.h>
#include <ATen/core/ivalue.h>
#include <c10/core/ScalarType.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <utility>

#include "torch/torch_internals.h"

namespace mixed_attention {
namespace {

using at::Tensor;

// NOTE: boxed, because releases of torch differ in the type of the group's name.
template <class... Arguments>
Tensor collective(const c10::OperatorHandle& op, Arguments&&... arguments) {
  torch::jit::Stack stack{c10::IValue(std::forward<Arguments>(arguments))...};
  op.callBoxed(stack);
  return stack.at(0).toTensor();
}

Tensor wait_for(const Tensor& received) {
  static const auto op = collective_operator("wait_tensor");
  return collective(op, received);
}

int64_t numbers(const std::vector<int64_t>& row) { return c10::multiply_integers(row); }

int64_t numbers(const std::vector<std::vector<int64_t>>& rows) {
  int64_t sum = 0;
  for (const std::vector<int64_t>& row : rows) sum += numbers(row);
  return sum;
}

std::vector<int64_t> row_of(const Tensor& rows) {
  const at::IntArrayRef sizes = rows.sizes();
  return {sizes.begin() + 1, sizes.end()};
}

Tensor flat(const Tensor& part) { return part.contiguous().view(-1); }

Tensor joined(const std::vector<Tensor>& pieces) { return pieces.size() == 1 ? pieces[0] : at::cat(pieces); }

// Parts that lie behind one another, as tensors of so many rows.
std::vector<Tensor> split_parts(const Tensor& together, const std::vector<std::vector<int64_t>>& rows, int64_t count) {
  std::vector<Tensor> parts;
  int64_t place = 0;
  for (const std::vector<int64_t>& row : rows) {
    std::vector<int64_t> shape{count};
    shape.insert(shape.end(), row.begin(), row.end());
    parts.push_back(together.narrow(0, place, count * numbers(row)).view(shape));
    place += count * numbers(row);
  }
  return parts;
}

// Where the rows of every rank begin in those of each group of the whole, [group][rank].
std::vector<std::vector<int64_t>> places_in_whole(const Shards& shards) {
  std::vector<std::vector<int64_t>> places;
  int64_t place = 0;
  for (const std::vector<int64_t>& sizes : shards.sizes) {
    places.emplace_back();
    for (const int64_t size : sizes) {
      places.back().push_back(place);
      place += size;
    }
  }
  return places;
}

// The rows of the whole rank by rank, of each all parts, filled up to so many rows where there are fewer.
std::vector<Tensor> by_rank(const std::vector<Tensor>& parts, const std::vector<std::vector<int64_t>>& rows,
                            const Shards& shards, int64_t at_least) {
  const bool is_full = at_least == 0 || at_least * shards.num_ranks() == shards.whole;
  if (parts.size() == 1 && shards.sizes.size() == 1 && is_full) return parts;
  const auto places = places_in_whole(shards);
  std::vector<Tensor> pieces;
  for (int64_t rank = 0; rank < shards.num_ranks(); ++rank) {
    for (size_t part = 0; part < parts.size(); ++part) {
      const int64_t width = numbers(rows[part]);
      for (size_t group = 0; group < shards.sizes.size(); ++group) {
        const int64_t size = shards.sizes[group][rank];
        if (size > 0) pieces.push_back(parts[part].narrow(0, places[group][rank] * width, size * width));
      }
    }
    const int64_t missing = at_least - shards.totals[rank];
    if (missing > 0) pieces.push_back(at::zeros({missing * numbers(rows)}, parts[0].options()));
  }
  return pieces;
}

}  // namespace

Shards::Shards(std::string group, int64_t rank, bool share_a_host, std::vector<std::vector<int64_t>> sizes)
    : group(std::move(group)), rank(rank), share_a_host(share_a_host), sizes(std::move(sizes)), most(0), whole(0) {
  TORCH_CHECK_VALUE(!this->sizes.empty(), "sizes: expected those of a group at least");
  totals.resize(this->sizes[0].size());
  for (const std::vector<int64_t>& of_group : this->sizes) {
    TORCH_CHECK_VALUE(of_group.size() == totals.size(), "sizes: expected one of every rank");
    for (size_t i = 0; i < totals.size(); ++i) totals[i] += of_group[i];
  }
  TORCH_CHECK_VALUE(0 <= rank && rank < num_ranks(), "rank: expected one of ", num_ranks(), ", got ", rank);
  for (const int64_t total : totals) {
    most = std::max(most, total);
    whole += total;
  }
}

InFlight start_gather(const std::vector<std::vector<Tensor>>& parts, const Shards& shards) {
  const WithoutAutocast no_autocast;
  static const auto op = collective_operator("all_gather_into_tensor");
  InFlight result{{}, {}, parts[0][0].options()};
  const int64_t missing = shards.most - shards.here();
  std::vector<Tensor> pieces;
  for (const std::vector<Tensor>& part : parts) {
    result.rows.push_back(row_of(part[0]));
    for (const Tensor& piece : part) pieces.push_back(flat(piece));
    if (missing > 0) pieces.push_back(at::empty({missing * numbers(result.rows.back())}, result.options));
  }
  if (shards.whole * numbers(result.rows) == 0) return result;
  result.received = collective(op, joined(pieces), shards.num_ranks(), shards.group);
  return result;
}

std::vector<Tensor> finish_gather(const InFlight& gather, const Shards& shards) {
  const WithoutAutocast no_autocast;
  if (!gather.received.defined()) return split_parts(at::empty({0}, gather.options), gather.rows, shards.whole);
  const Tensor received = wait_for(gather.received);
  const bool is_whole = gather.rows.size() == 1 && shards.sizes.size() == 1 &&
                        shards.most * shards.num_ranks() == shards.whole;  // as many on every rank
  if (is_whole) return split_parts(received, gather.rows, shards.whole);
  const int64_t of_rank = shards.most * numbers(gather.rows);
  std::vector<Tensor> pieces;
  int64_t before = 0;  // of the parts
  for (const std::vector<int64_t>& row : gather.rows) {
    const int64_t width = numbers(row);
    std::vector<int64_t> taken(shards.num_ranks());
    for (const std::vector<int64_t>& sizes : shards.sizes) {
      for (int64_t rank = 0; rank < shards.num_ranks(); ++rank) {
        const int64_t start = rank * of_rank + before + taken[rank] * width;
        if (sizes[rank] > 0) pieces.push_back(received.narrow(0, start, sizes[rank] * width));
        taken[rank] += sizes[rank];
      }
    }
    before += shards.most * width;
  }
  return split_parts(joined(pieces), gather.rows, shards.whole);
}

// NOTE: on one host the parts of all ranks go to the rank that adds them up, in the order of the ranks: bits depend on
// no algorithm. Those of GPUs travel rounded, which halves the bytes; CPUs have sums of fp32 that nobody has rounded.
// Whether one rank has them or not, all send the same dtype. Between hosts an all-to-all would not use all network
// cards.
InFlight start_sums(at::TensorList parts, const Shards& shards, at::ScalarType dtype) {
  const WithoutAutocast no_autocast;
  static const auto exchange = collective_operator("all_to_all_single");
  static const auto reduce = collective_operator("reduce_scatter_tensor");
  InFlight result{{}, {}, parts[0].options().dtype(dtype)};
  for (const Tensor& part : parts) result.rows.push_back(row_of(part));
  const int64_t width = numbers(result.rows);
  if (shards.whole * width == 0) return result;
  const bool is_rounded = shards.share_a_host && !parts[0].is_cpu();
  const at::ScalarType sent_dtype = is_rounded ? dtype : c10::promoteTypes(dtype, at::kFloat);
  std::vector<Tensor> wholes;
  for (const Tensor& part : parts) wholes.push_back(flat(part.to(sent_dtype)));
  if (shards.share_a_host) {
    std::vector<int64_t> sent, received(shards.num_ranks(), shards.here() * width);
    for (const int64_t total : shards.totals) sent.push_back(total * width);
    const Tensor together = joined(by_rank(wholes, result.rows, shards, 0));
    result.received = collective(exchange, together, std::move(received), std::move(sent), shards.group);
  } else {
    const Tensor together = joined(by_rank(wholes, result.rows, shards, shards.most));
    result.received = collective(reduce, together, std::string("sum"), shards.num_ranks(), shards.group);
  }
  return result;
}

namespace {

// What every rank sent to this one (ranks, shards.here() * numbers of a row), or one sum that was made on the way.
Tensor wait_for_parts(const InFlight& sums, const Shards& shards) {
  const Tensor received = wait_for(sums.received);
  const int64_t count = shards.here() * numbers(sums.rows);
  return shards.share_a_host ? received.view({shards.num_ranks(), count}) : received.narrow(0, 0, count).unsqueeze(0);
}

// Adds up along the first dimension, in its order and in fp32 at least, and rounds once.
void add_up(const Tensor& parts, const Tensor& sum) {
  if (parts.scalar_type() != sum.scalar_type() || parts.size(0) == 1) {
    sum.copy_(parts.sum(0));
  } else if (parts.size(0) == 2) {  // two numbers of 16 bits are added in fp32, too
    at::add_out(const_cast<Tensor&>(sum), parts[0], parts[1]);
  } else {
    at::sum_out(const_cast<Tensor&>(sum), parts, at::IntArrayRef{0});
  }
}

}  // namespace

std::vector<Tensor> finish_sums(const InFlight& sums, const Shards& shards) {
  const WithoutAutocast no_autocast;
  const Tensor together = at::empty({shards.here() * numbers(sums.rows)}, sums.options);
  if (sums.received.defined()) add_up(wait_for_parts(sums, shards), together);
  return split_parts(together, sums.rows, shards.here());
}

void finish_sums_into(const InFlight& sums, const Shards& shards, const Tensor& result) {
  const WithoutAutocast no_autocast;
  if (!sums.received.defined()) return;  // there is nothing of it
  const Tensor parts = wait_for_parts(sums, shards);
  std::vector<int64_t> shape(result.sizes().vec());
  shape.insert(shape.begin(), parts.size(0));
  add_up(parts.view(shape), result);
}

}  // namespace mixed_attention
