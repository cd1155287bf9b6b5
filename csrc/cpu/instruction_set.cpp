#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "environment.h"

namespace mixed_attention::cpu {

// What other processors, or other systems, do not have.
#if !defined(__x86_64__)
const InstructionSet kAvx512Bf16{"AVX512_BF16", [] { return false; }, {}};
const InstructionSet kAvx512{"AVX512", [] { return false; }, {}};
const InstructionSet kAvx2{"AVX2", [] { return false; }, {}};
#endif
#if !defined(__x86_64__) || !defined(__linux__)
const InstructionSet kAmx{"AMX", [] { return false; }, {}};
#endif

namespace {

const InstructionSet& choose() {
  std::vector<const InstructionSet*> available;  // best first
  std::vector<std::string> names;
  for (const InstructionSet* candidate : {&kAmx, &kAvx512Bf16, &kAvx512, &kAvx2, &kPortable}) {
    if (!candidate->is_available()) continue;
    available.push_back(candidate);
    names.push_back(candidate->name);
  }
  const std::string wanted = choice_of_environment("MIXED_ATTENTION_CPU", names, " (what this machine offers)");
  const auto chosen = wanted.empty() ? names.begin() : std::find(names.begin(), names.end(), wanted);
  return *available[chosen - names.begin()];
}

}  // namespace

const InstructionSet& selected_instruction_set() {
  static const InstructionSet& selected = choose();
  return selected;
}

const AttentionKernels& attention_kernels(const AttentionParams& params) {
  // A score is the product times the scale. With the scale of any head_dim the product overflows where the score is
  // beyond 2^112, which decides its row anyhow.
  constexpr double kLeastScale = 0x1p-16;
  const InstructionSet* set = &selected_instruction_set();
  const bool has_pairs = set == &kAmx || set == &kAvx512Bf16;
  if (has_pairs && params.dtype == DType::kBFloat16 && std::abs(params.softmax_scale) < kLeastScale) set = &kAvx512;
  return set->kernels[static_cast<int>(params.dtype)];
}

const char* instruction_set() { return selected_instruction_set().name; }

}  // namespace mixed_attention::cpu
