#include "torch/schedules.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace mixed_attention {
namespace {

struct Kept {
  std::vector<int64_t> segments;
  Schedule schedule;
  std::once_flag has_inverse;

  bool is_of(c10::IntArrayRef given, int64_t seqlen_q, int64_t seqlen_k) const {
    return schedule.seqlen_q == seqlen_q && schedule.seqlen_k == seqlen_k && given.equals(segments);
  }
};

// Enough for all sizes that a training run meets; what is forgotten is made again.
constexpr size_t kMostNumbers = 1 << 20;

class Memory {
 public:
  std::shared_ptr<Kept> of(c10::IntArrayRef segments, int64_t seqlen_q, int64_t seqlen_k) {
    const size_t hash = hash_of(segments);
    {
      const std::lock_guard lock(mutex_);
      const auto [begin, end] = kept_.equal_range(hash);
      for (auto each = begin; each != end; ++each) {
        if (each->second->is_of(segments, seqlen_q, seqlen_k)) return each->second;
      }
    }
    auto made = std::make_shared<Kept>();
    made->schedule = parse_schedule(segments.data(), segments.size(), seqlen_q, seqlen_k);
    made->segments = segments.vec();
    const std::lock_guard lock(mutex_);
    if (num_numbers_ + segments.size() > kMostNumbers) {
      kept_.clear();
      num_numbers_ = 0;
    }
    num_numbers_ += segments.size() + 1;
    kept_.emplace(hash, made);
    return made;
  }

 private:
  static size_t hash_of(c10::IntArrayRef numbers) {
    uint64_t hash = numbers.size();
    for (const int64_t number : numbers) hash = (hash ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 32;
  }

  std::mutex mutex_;
  std::unordered_multimap<size_t, std::shared_ptr<Kept>> kept_;
  size_t num_numbers_ = 0;
};

}  // namespace

std::shared_ptr<const Schedule> schedule_of(c10::IntArrayRef segments, int64_t seqlen_q, int64_t seqlen_k, Pass pass) {
  static auto* memory = new Memory;  // never freed: threads may outlive static objects
  const std::shared_ptr<Kept> kept = memory->of(segments, seqlen_q, seqlen_k);
  // NOTE: whoever reads the schedule of a forward meanwhile does not look at the inverse.
  if (pass == Pass::kBackward) std::call_once(kept->has_inverse, [&] { add_inverse(kept->schedule); });
  return {kept, &kept->schedule};
}

}  // namespace mixed_attention
