// What is made once and found again by later calls.
#pragma once

#include <cstddef>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace mixed_attention::cuda {

// The values that were asked for last. Keys hold all that a value depends on. Any thread may call.
template <class Key, class Value>
class Kept {
 public:
  explicit Kept(size_t most_values) : most_values_(most_values) {}

  // make() makes a value that is not kept. Whoever holds a value may read it for as long as they like.
  template <class Make>
  std::shared_ptr<const Value> of(const Key& key, const Make& make) {
    if (std::shared_ptr<const Value> found = find(key)) return found;
    auto made = std::make_shared<const Value>(make());
    const std::lock_guard lock(mutex_);
    if (const auto place = places_.find(key); place != places_.end()) return place->second->second;  // another thread's
    recent_.emplace_front(key, made);
    places_.emplace(key, recent_.begin());
    if (recent_.size() > most_values_) {
      places_.erase(recent_.back().first);
      recent_.pop_back();
    }
    return made;
  }

 private:
  using Entries = std::list<std::pair<Key, std::shared_ptr<const Value>>>;

  std::shared_ptr<const Value> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto place = places_.find(key);
    if (place == places_.end()) return nullptr;
    recent_.splice(recent_.begin(), recent_, place->second);
    return place->second->second;
  }

  const size_t most_values_;
  std::mutex mutex_;
  Entries recent_;  // the last one first
  std::map<Key, typename Entries::iterator> places_;
};

}  // namespace mixed_attention::cuda
