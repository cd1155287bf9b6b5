#include "torch/memory.h"

#include <algorithm>

namespace mixed_attention {
namespace {

// A multiple of a stride, from low to high times.
struct Step {
  int64_t stride, low, high;
};

using Steps = c10::SmallVector<Step, 8>;

int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Whether distance + the sum of some multiple of every step, from number `next` on, can lie in [low, high]. Where
// strides are nested, there is one multiple to try of each, or two.
bool reaches(int64_t distance, const Steps& steps, size_t next, int64_t low, int64_t high, int& patience) {
  if (next == steps.size()) return low <= distance && distance <= high;
  if (--patience < 0) return true;
  int64_t rest_low = 0, rest_high = 0;
  for (size_t i = next + 1; i < steps.size(); ++i) {
    rest_low += steps[i].stride * steps[i].low;
    rest_high += steps[i].stride * steps[i].high;
  }
  const Step& step = steps[next];
  const int64_t first = std::max(step.low, -floor_divide(distance + rest_high - low, step.stride));
  const int64_t last = std::min(step.high, floor_divide(high - rest_low - distance, step.stride));
  for (int64_t multiple = first; multiple <= last; ++multiple) {
    if (reaches(distance + multiple * step.stride, steps, next + 1, low, high, patience)) return true;
  }
  return false;
}

}  // namespace

Footprint::Footprint(const void* data, c10::IntArrayRef sizes, c10::IntArrayRef strides, int64_t element_size)
    : begin_(static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(data))), run_(element_size), extent_(0) {
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] == 0) {
      run_ = 0;
      return;
    }
    if (sizes[dim] > 1) dims_.push_back({strides[dim] * element_size, sizes[dim]});
  }
  std::sort(dims_.begin(), dims_.end(), [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  auto outer = dims_.begin();
  for (; outer != dims_.end() && outer->stride == run_; ++outer) run_ *= outer->size;
  dims_.erase(dims_.begin(), outer);
  extent_ = run_;
  for (const Dim& dim : dims_) extent_ += dim.stride * (dim.size - 1);
}

bool Footprint::overlaps_itself() const {
  if (run_ == 0) return false;
  int64_t within = run_;
  for (const Dim& dim : dims_) {
    if (dim.stride < within) return true;
    within += dim.stride * (dim.size - 1);
  }
  return false;
}

bool Footprint::overlaps(const Footprint& other) const {
  if (run_ == 0 || other.run_ == 0) return false;
  if (begin_ + extent_ <= other.begin_ || other.begin_ + other.extent_ <= begin_) return false;
  Steps steps;
  const auto add = [&](const Step& step) {
    if (step.stride == 0) return;
    const auto same = std::find_if(steps.begin(), steps.end(), [&](const Step& s) { return s.stride == step.stride; });
    if (same == steps.end()) {
      steps.push_back(step);
    } else {
      same->low += step.low;
      same->high += step.high;
    }
  };
  for (const Dim& dim : dims_) add({dim.stride, 0, dim.size - 1});
  for (const Dim& dim : other.dims_) add({dim.stride, 1 - dim.size, 0});
  std::sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) { return a.stride > b.stride; });
  int patience = 10'000;
  return reaches(begin_ - other.begin_, steps, 0, 1 - run_, other.run_ - 1, patience);
}

}  // namespace mixed_attention
