#include "problem.h"

#include <algorithm>
#include <random>

namespace walks {
namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : generator_(seed) {}

  // Draws from [low, high].
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(generator_() % (high - low + 1)); }
  bool one_in(int64_t count) { return between(1, count) == 1; }
  uint32_t die() { return static_cast<uint32_t>(generator_() >> 32); }

 private:
  std::mt19937_64 generator_;
};

// Rows of a group: none, a few, around the edges of tiles, some hundreds, now and then thousands.
int64_t random_size(Random& random, bool may_be_large) {
  constexpr int kTiles[] = {16, 32, 64, 80, 96, 128, 192, 384};
  switch (random.between(0, 9)) {
    case 0: return 0;
    case 1: return 1;
    case 2: return random.between(0, 40);
    case 3:
    case 4:
    case 5:
    case 6: {
      const int64_t tiles = may_be_large ? random.between(1, 6) : random.between(1, 2);
      return std::max<int64_t>(0, tiles * kTiles[random.between(0, 7)] + random.between(-1, 1));
    }
    case 7:
    case 8: return random.between(0, may_be_large ? 700 : 100);
    default: return random.between(0, may_be_large ? 4000 : 300);
  }
}

int64_t random_num_groups(Random& random) {
  switch (random.between(0, 9)) {
    case 0: return random.between(1, 60);
    case 1: return random.between(28, 34);  // where ragged tiles no longer stand apart
    default: return random.between(1, 8);
  }
}

}  // namespace

int64_t Problem::seqlen_q() const {
  int64_t rows = 0;
  for (const Segment& segment : segments) rows += segment.num_rows;
  return rows;
}

std::vector<int64_t> Problem::flat() const {
  std::vector<int64_t> flat;
  int64_t begin = 0;
  for (const Segment& segment : segments) {
    flat.insert(flat.end(), {begin, begin + segment.num_rows, static_cast<int64_t>(segment.keys.size())});
    for (const ma::Range& keys : segment.keys) flat.insert(flat.end(), {keys.begin, keys.end});
    begin += segment.num_rows;
  }
  return flat;
}

std::string Problem::describe() const {
  std::string text = "batch_size " + std::to_string(batch_size) + ", num_heads " + std::to_string(num_heads) +
                     ", seqlen_k " + std::to_string(seqlen_k) + ", " + std::to_string(num_multiprocessors) +
                     " multiprocessors, flat plan";
  for (const int64_t number : flat()) text.append(" ").append(std::to_string(number));
  text += "; dice";
  for (const uint32_t die : dice) text.append(" ").append(std::to_string(die));
  return text;
}

Problem random_problem(uint64_t seed) {
  Random random(seed);
  Problem problem{};
  const int64_t num_groups = random_num_groups(random);
  const bool may_be_large = num_groups <= 12;
  std::vector<ma::Range> groups;
  for (int64_t i = 0; i < num_groups; ++i) {
    const int64_t begin = groups.empty() ? 0 : groups.back().end;
    groups.push_back({begin, begin + random_size(random, may_be_large)});
  }
  problem.seqlen_k = groups.back().end;

  // Patterns list some groups, one of them perhaps twice; a few list none.
  std::vector<std::vector<ma::Range>> patterns;
  const int64_t num_patterns = random.between(1, std::min<int64_t>(num_groups, 6));
  for (int64_t i = 0; i < num_patterns; ++i) {
    std::vector<ma::Range> keys;
    const int64_t num_keys = random.one_in(12) ? 0 : random.between(1, std::min<int64_t>(num_groups + 1, 8));
    for (int64_t k = 0; k < num_keys; ++k) {
      const ma::Range range = groups[random.between(0, num_groups - 1)];
      const bool is_next = !keys.empty() && keys.back().end == range.begin;
      if (is_next && !random.one_in(2)) {
        keys.back().end = range.end;
      } else {
        keys.push_back(range);
      }
    }
    patterns.push_back(std::move(keys));
  }

  // Queries are those of the groups, or others.
  const bool attends_to_itself = !random.one_in(3);
  const int64_t num_query_groups = attends_to_itself ? num_groups : random_num_groups(random);
  int64_t last_pattern = -1;
  for (int64_t i = 0; i < num_query_groups; ++i) {
    const int64_t rows = attends_to_itself ? groups[i].size() : random_size(random, num_query_groups <= 12);
    const int64_t pattern = random.between(0, num_patterns - 1);
    if (pattern == last_pattern) {
      problem.segments.back().num_rows += rows;
    } else {
      problem.segments.push_back({rows, patterns[pattern]});
    }
    last_pattern = pattern;
  }

  // As many heads and sequences as leave a plan quick to walk.
  const int64_t num_rows = std::max(problem.seqlen_q(), problem.seqlen_k);
  const int64_t most = num_rows > 4000 ? 2 : num_rows > 1000 ? 6 : 24;
  problem.num_heads = random.one_in(3) ? 1 : random.between(1, most);
  problem.batch_size = random.one_in(2) ? 1 : random.between(1, std::max<int64_t>(1, most / problem.num_heads));
  constexpr int kMultiprocessors[] = {1, 2, 16, 66, 78, 108, 132, 144};
  problem.num_multiprocessors = kMultiprocessors[random.between(0, 7)];
  for (uint32_t& die : problem.dice) die = random.die();
  return problem;
}

std::vector<Problem> largest_problems(int64_t num_rows) {
  Problem of_queries{{{num_rows, {{0, 3}, {1, 3}}}}, 3, 1, 1, 132, {}};
  // Walks that end at the last row and go on elsewhere.
  Problem of_keys{{{3, {{1, num_rows}, {0, 5}, {num_rows - 7, num_rows}, {2, 3}}}}, num_rows, 1, 1, 132, {}};
  return {of_queries, of_keys};
}

std::vector<Problem> smaller_problems(const Problem& problem) {
  std::vector<Problem> smaller;
  const auto add = [&](const auto& change) {
    smaller.push_back(problem);
    change(smaller.back());
  };
  for (size_t i = 0; i < problem.segments.size(); ++i) {
    if (problem.segments.size() > 1) add([&](Problem& p) { p.segments.erase(p.segments.begin() + i); });
    const int64_t rows = problem.segments[i].num_rows;
    for (const int64_t fewer : {rows / 2, rows - 64, rows - 1}) {
      if (fewer > 0 && fewer < rows) add([&](Problem& p) { p.segments[i].num_rows = fewer; });
    }
    const std::vector<ma::Range>& ranges = problem.segments[i].keys;
    for (size_t k = 0; k < ranges.size(); ++k) {
      add([&](Problem& p) { p.segments[i].keys.erase(p.segments[i].keys.begin() + k); });
      for (const int64_t fewer : {ranges[k].size() / 2, ranges[k].size() - 64, ranges[k].size() - 1}) {
        if (fewer <= 0 || fewer >= ranges[k].size()) continue;
        add([&](Problem& p) { p.segments[i].keys[k].end = p.segments[i].keys[k].begin + fewer; });
      }
      if (ranges[k].begin > 0) {
        add([&](Problem& p) { p.segments[i].keys[k] = {0, p.segments[i].keys[k].size()}; });
      }
    }
  }
  int64_t last_key = 0;
  for (const Segment& segment : problem.segments) {
    for (const ma::Range& keys : segment.keys) last_key = std::max(last_key, keys.end);
  }
  if (last_key < problem.seqlen_k) add([&](Problem& p) { p.seqlen_k = last_key; });
  if (problem.batch_size > 1) add([](Problem& p) { p.batch_size /= 2; });
  if (problem.num_heads > 1) add([](Problem& p) { p.num_heads /= 2; });
  if (problem.num_heads > 1) add([](Problem& p) { --p.num_heads; });
  return smaller;
}

}  // namespace walks
