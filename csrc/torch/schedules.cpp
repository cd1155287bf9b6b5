#include "torch/schedules.h"

#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels.h"
#include "schedule.h"

namespace mixed_attention {
namespace {

std::shared_ptr<Schedule> make(c10::IntArrayRef segments, int64_t seqlen_q, int64_t seqlen_k, Walker walker) {
  if (walker == Walker::kCuda) return kernels::make_schedule(segments.data(), segments.size(), seqlen_q, seqlen_k);
  return std::make_shared<Schedule>(parse_schedule(segments.data(), segments.size(), seqlen_q, seqlen_k));
}

struct KeptSchedule {
  KeptSchedule(c10::IntArrayRef segments, int64_t seqlen_q, int64_t seqlen_k, Walker walker)
      : segments(segments.vec()),
        seqlen_q(seqlen_q),
        seqlen_k(seqlen_k),
        walker(walker),
        schedule(make(segments, seqlen_q, seqlen_k, walker)) {}

  bool is_of(int64_t given_q, int64_t given_k, Walker given_walker) const {
    return seqlen_q == given_q && seqlen_k == given_k && walker == given_walker;
  }

  void add_inverse() {
    std::call_once(has_inverse, [&] {
      walker == Walker::kCuda ? kernels::add_inverse(*schedule) : mixed_attention::add_inverse(*schedule);
    });
  }

  const std::vector<int64_t> segments;
  const int64_t seqlen_q, seqlen_k;
  const Walker walker;
  const std::shared_ptr<Schedule> schedule;
  std::once_flag has_inverse;
};

// Enough for all sizes that a training run meets; what is forgotten is made again.
constexpr size_t kMostNumbers = 1 << 20;

class Memory {
 public:
  std::shared_ptr<KeptSchedule> of(c10::IntArrayRef segments, int64_t seqlen_q, int64_t seqlen_k, Walker walker) {
    if (std::shared_ptr<KeptSchedule> found = by_place(segments, seqlen_q, seqlen_k, walker)) return found;
    std::shared_ptr<KeptSchedule> found = by_value(segments, seqlen_q, seqlen_k, walker);
    const std::lock_guard lock(mutex_);
    if (const auto place = places_.find(segments.data()); place != places_.end())
      place->second = {segments.size(), found};
    return found;
  }

  // A place of integers that neither move nor change before it is left.
  void enter(const int64_t* place) {
    const std::lock_guard lock(mutex_);
    places_.emplace(place, Placed{});
  }

  void leave(const int64_t* place) {
    const std::lock_guard lock(mutex_);
    places_.erase(place);
  }

 private:
  // What was last found for integers at a place, and for how many of them.
  struct Placed {
    size_t length = 0;
    std::shared_ptr<KeptSchedule> kept;
  };

  std::shared_ptr<KeptSchedule> by_place(c10::IntArrayRef segments, int64_t seqlen_q, int64_t seqlen_k, Walker walker) {
    const std::lock_guard lock(mutex_);
    const auto place = places_.find(segments.data());
    if (place == places_.end()) return nullptr;
    const auto& [length, kept] = place->second;
    return kept != nullptr && length == segments.size() && kept->is_of(seqlen_q, seqlen_k, walker) ? kept : nullptr;
  }

  std::shared_ptr<KeptSchedule> by_value(c10::IntArrayRef segments, int64_t seqlen_q, int64_t seqlen_k, Walker walker) {
    const size_t hash = hash_of(segments);
    {
      const std::lock_guard lock(mutex_);
      const auto [begin, end] = kept_.equal_range(hash);
      for (auto each = begin; each != end; ++each) {
        if (each->second->is_of(seqlen_q, seqlen_k, walker) && segments.equals(each->second->segments))
          return each->second;
      }
    }
    auto made = std::make_shared<KeptSchedule>(segments, seqlen_q, seqlen_k, walker);
    const std::lock_guard lock(mutex_);
    if (num_numbers_ + segments.size() > kMostNumbers) {
      kept_.clear();
      num_numbers_ = 0;
    }
    num_numbers_ += segments.size() + 1;
    kept_.emplace(hash, made);
    return made;
  }

  static size_t hash_of(c10::IntArrayRef numbers) {
    uint64_t hash = numbers.size();
    for (const int64_t number : numbers) hash = (hash ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 32;
  }

  std::mutex mutex_;
  std::unordered_multimap<size_t, std::shared_ptr<KeptSchedule>> kept_;
  size_t num_numbers_ = 0;
  std::unordered_map<const int64_t*, Placed> places_;
};

Memory& memory() {
  static auto* memory = new Memory;  // never freed: threads may outlive static objects
  return *memory;
}

}  // namespace

std::shared_ptr<const Schedule> schedule_of(c10::IntArrayRef segments, int64_t seqlen_q, int64_t seqlen_k, Pass pass,
                                            Walker walker) {
  const std::shared_ptr<KeptSchedule> kept = memory().of(segments, seqlen_q, seqlen_k, walker);
  // NOTE: whoever reads the schedule of a forward meanwhile does not look at the inverse.
  if (pass == Pass::kBackward) kept->add_inverse();
  return {kept, kept->schedule.get()};
}

FlatPlan::FlatPlan(std::vector<int64_t> numbers) : numbers_(std::move(numbers)) {
  if (!numbers_.empty()) memory().enter(numbers_.data());
}

FlatPlan::~FlatPlan() {
  if (!numbers_.empty()) memory().leave(numbers_.data());
}

}  // namespace mixed_attention
