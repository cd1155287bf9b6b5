// Work is done once: for random plans the walk of every kernel, that of the device itself run by the host, visits every
// (sequence, head, query, key) as often as the plan lists it and nothing else, and what it writes has one place each.
// For every pair of widths, copies bring what is expected of them.
//
// walks [number of plans] [seed of the first]: prints a seed that fails, and a smaller plan that still does.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/portable/work_table.h"
#include "problem.h"

namespace {

using walks::Problem;

struct Check {
  const char* name;
  void (*run)(const Problem&);
  int64_t most_rows;  // that a tensor may have; 0: 64 bits count them
};

// So many are walked in less than a minute; of more than these, the largest sizes are walked, too.
constexpr int64_t kPlans = 12'000;

// TMA's tensor maps have fewer than 2^30 rows (hopper/tensor_map.cpp).
constexpr Check kChecks[] = {{"Hopper, forward", walks::check_hopper_fwd, (int64_t{1} << 30) - 2},
                             {"Hopper, backward", walks::check_hopper_bwd, (int64_t{1} << 30) - 2},
                             {"portable", walks::check_portable, mixed_attention::cuda::kMaxRows},
                             {"CPU", walks::check_cpu, 0}};

// What is wrong with a problem; empty where nothing is.
std::string failure(const Check& check, const Problem& problem) {
  try {
    check.run(problem);
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

int main(int num_arguments, char** arguments) {
  const int64_t num_plans = num_arguments > 1 ? std::atoll(arguments[1]) : kPlans;
  const uint64_t first_seed = num_arguments > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  std::atomic<int64_t> next = 0;
  std::atomic<bool> has_failed = false;
  std::mutex printing;

  const auto work = [&] {
    for (int64_t i; !has_failed && (i = next++) < num_plans;) {
      const uint64_t seed = first_seed + static_cast<uint64_t>(i);
      const Problem problem = walks::random_problem(seed);
      for (const Check& check : kChecks) {
        if (failure(check, problem).empty()) continue;
        const std::scoped_lock lock(printing);
        if (has_failed.exchange(true)) return;
        const Problem small = shrink(problem, [&](const Problem& other) { return !failure(check, other).empty(); });
        std::printf("FAIL %s, seed %llu: %s\n  %s\n", check.name, static_cast<unsigned long long>(seed),
                    failure(check, problem).c_str(), problem.describe().c_str());
        std::printf("smaller: %s\n  %s\n", failure(check, small).c_str(), small.describe().c_str());
        return;
      }
    }
  };
  try {
    walks::check_copies();
  } catch (const std::exception& error) {
    std::printf("FAIL copies on Hopper: %s\n", error.what());
    return 1;
  }
  for (const Check& check : kChecks) {
    if (check.most_rows == 0 || num_plans <= kPlans) continue;
    for (const Problem& problem : walks::largest_problems(check.most_rows)) {
      const std::string wrong = failure(check, problem);
      if (wrong.empty()) continue;
      std::printf("FAIL %s: %s\n  %s\n", check.name, wrong.c_str(), problem.describe().c_str());
      return 1;
    }
  }
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  if (!has_failed) std::printf("ok   %lld plans\n", static_cast<long long>(num_plans));
  return has_failed ? 1 : 0;
}
