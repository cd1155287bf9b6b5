// A plan, the sizes of a call, and the choices that a test makes beside: made at random, described, made smaller.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "schedule.h"

namespace walks {

namespace ma = mixed_attention;

// What a check throws: in words, what is wrong.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void expect(bool holds, const char* what) {
  if (!holds) throw Failure(what);
}

struct Segment {
  int64_t num_rows;
  std::vector<ma::Range> keys;
};

struct Problem {
  std::vector<Segment> segments;
  int64_t seqlen_k;
  int64_t batch_size, num_heads;
  int num_multiprocessors;
  std::array<uint32_t, 16> dice;  // by which a check chooses what it forces

  int64_t seqlen_q() const;
  int64_t num_sequences() const { return batch_size * num_heads; }
  std::vector<int64_t> flat() const;
  std::string describe() const;

  // One of `count` choices; die: which of the dice.
  int64_t choose(int die, int64_t count) const { return dice[die] % count; }
  template <class T, size_t kCount>
  const T& choose(int die, const T (&choices)[kCount]) const {
    return choices[dice[die] % kCount];
  }
};

Problem random_problem(uint64_t seed);

// As many queries, or keys, as the kernels count, with a few on the other side.
std::vector<Problem> largest_problems(int64_t num_rows);

// Returns a problem that fails in the same way and that no small step makes smaller. fails: whether a problem does.
template <class Fails>
Problem shrink(Problem problem, const Fails& fails);

// Every problem that is one step smaller.
std::vector<Problem> smaller_problems(const Problem& problem);

template <class Fails>
Problem shrink(Problem problem, const Fails& fails) {
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    for (const Problem& smaller : smaller_problems(problem)) {
      if (!fails(smaller)) continue;
      problem = smaller;
      goes_on = true;
      break;
    }
  }
  return problem;
}

// The device of a problem is this number; device.h's functions answer for it.
inline constexpr int kDevice = 0;
// Answered to the calling thread for any device.
inline thread_local int multiprocessors_of_device = 0;

// One function a family; each checks all its passes and throws a Failure.
void check_hopper_fwd(const Problem& problem);
void check_hopper_bwd(const Problem& problem);
void check_portable(const Problem& problem);
void check_cpu(const Problem& problem);

// Copies of Hopper's kernels, for every pair of widths; throws a Failure.
void check_copies();

}  // namespace walks
