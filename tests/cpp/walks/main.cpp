// Work is done once: for random plans the walk of every kernel, that of the device itself run by the host, visits every
// (sequence, head, query, key) as often as the plan lists it and nothing else, and what it writes has one place each.
//
// walks [number of plans] [seed of the first]: prints a seed that fails, and a smaller plan that still does.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "problem.h"

namespace {

using walks::Problem;

struct Check {
  const char* name;
  void (*run)(const Problem&);
};

constexpr Check kChecks[] = {{"Hopper, forward", walks::check_hopper_fwd},
                             {"Hopper, backward", walks::check_hopper_bwd},
                             {"portable", walks::check_portable},
                             {"CPU", walks::check_cpu}};

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
  const int64_t num_plans = num_arguments > 1 ? std::atoll(arguments[1]) : 20'000;
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
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  if (!has_failed) std::printf("ok   %lld plans\n", static_cast<long long>(num_plans));
  return has_failed ? 1 : 0;
}
