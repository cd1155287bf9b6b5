#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/launch.h"

namespace mixed_attention::cpu {
namespace {

const InstructionSet& choose() {
  const char* wanted = std::getenv("MIXED_ATTENTION_CPU");
  std::string available;
  for (const InstructionSet* candidate : {&kAmx, &kAvx512Bf16, &kAvx512, &kAvx2, &kPortable}) {
    if (!candidate->is_available()) continue;
    if (!wanted || std::string(wanted) == candidate->name) return *candidate;
    available += std::string(available.empty() ? "" : ", ") + candidate->name;
  }
  throw std::runtime_error("MIXED_ATTENTION_CPU: expected one of " + available + ", got " + wanted);
}

}  // namespace

const InstructionSet& selected_instruction_set() {
  static const InstructionSet& selected = choose();
  return selected;
}

const char* instruction_set() { return selected_instruction_set().name; }

}  // namespace mixed_attention::cpu
