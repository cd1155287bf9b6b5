// What a walk visits, and whether that is what a plan lists: as often, and nothing else.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "problem.h"

namespace walks {

// Query rows and key rows of one (sequence, head) that are visited together.
struct Visit {
  int64_t sequence;
  ma::Range rows, keys;
};

// A sum over all visited (sequence, query, key) of weights that are as good as random: equal sums are equal visits but
// with a chance of some 2^-60. The weight of a range is a difference of two numbers, so that a visit costs the same
// whatever its size.
class Visits {
 public:
  void add(int64_t sequence, ma::Range rows, ma::Range keys) {
    sum_ += weight(kSequences, {sequence, sequence + 1}) * weight(kQueries, rows) * weight(kKeys, keys);
    if (visits_.size() < kMostRemembered) visits_.push_back({sequence, rows, keys});
  }

  // Throws where the others are not the same; what: of the first difference.
  void expect_equal(const Visits& listed, const char* what) const {
    if (sum_ != listed.sum_) throw Failure(std::string(what) + ": " + difference(listed));
  }

 private:
  static constexpr uint64_t kSequences = 0x9e3779b97f4a7c15, kQueries = 0xd1342543de82ef95, kKeys = 0xaf251af3b0f025b5;

  static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }

  static uint64_t weight(uint64_t salt, ma::Range range) {
    return mix(salt + static_cast<uint64_t>(range.end)) - mix(salt + static_cast<uint64_t>(range.begin));
  }

  static constexpr size_t kMostRemembered = 1'000'000;

  // In words: the first place that is visited more or less often than listed.
  std::string difference(const Visits& listed) const {
    std::map<int64_t, std::map<int64_t, std::map<int64_t, int>>> steps;  // of the count, by sequence, row and key
    const auto add = [&](const std::vector<Visit>& visits, int count) {
      for (const Visit& visit : visits) {
        auto& of_sequence = steps[visit.sequence];
        of_sequence[visit.rows.begin][visit.keys.begin] += count;
        of_sequence[visit.rows.begin][visit.keys.end] -= count;
        of_sequence[visit.rows.end][visit.keys.begin] -= count;
        of_sequence[visit.rows.end][visit.keys.end] += count;
      }
    };
    if (visits_.size() == kMostRemembered || listed.visits_.size() == kMostRemembered) return "somewhere";
    add(visits_, 1);
    add(listed.visits_, -1);
    for (const auto& [sequence, rows] : steps) {
      for (const auto& [row, keys] : rows) {
        for (const auto& [key, count] : keys) {
          if (count == 0) continue;
          return "query row " + std::to_string(row) + " and key row " + std::to_string(key) + " of sequence " +
                 std::to_string(sequence) + " are visited " + std::to_string(std::abs(count)) + " times too " +
                 (count > 0 ? "often" : "rarely");
        }
      }
    }
    return "somewhere";
  }

  uint64_t sum_ = 0;
  std::vector<Visit> visits_;
};

// What a plan lists, for every sequence.
inline Visits listed_visits(const Problem& problem) {
  Visits visits;
  for (int64_t sequence = 0; sequence < problem.num_sequences(); ++sequence) {
    int64_t begin = 0;
    for (const Segment& segment : problem.segments) {
      for (const ma::Range& keys : segment.keys) visits.add(sequence, {begin, begin + segment.num_rows}, keys);
      begin += segment.num_rows;
    }
  }
  return visits;
}

// Rows that were written, as visits of a single key.
class Rows {
 public:
  void add(int64_t sequence, ma::Range rows) { visits_.add(sequence, rows, {0, 1}); }

  void expect_all(int64_t num_sequences, int64_t num_rows, const char* what) const {
    Visits all;
    for (int64_t sequence = 0; sequence < num_sequences; ++sequence) all.add(sequence, {0, num_rows}, {0, 1});
    visits_.expect_equal(all, what);
  }

 private:
  Visits visits_;
};

// Calls walk() as every block of a grid.
template <class Walk>
void for_each_block(int num_blocks, const Walk& walk) {
  gridDim.x = static_cast<unsigned>(num_blocks);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) walk();
}

}  // namespace walks
