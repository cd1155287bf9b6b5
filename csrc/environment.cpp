#include "environment.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace mixed_attention {

std::string choice_of_environment(const char* variable, const std::vector<std::string>& expected,
                                  const std::string& remark) {
  const char* value = std::getenv(variable);
  if (value == nullptr || *value == '\0') return "";
  if (std::find(expected.begin(), expected.end(), value) != expected.end()) return value;
  std::string choices;
  for (const std::string& choice : expected) choices.append(choices.empty() ? "" : ", ").append(choice);
  throw std::invalid_argument(std::string(variable) + ": expected one of " + choices + remark + ", or nothing, got " +
                              value);
}

bool asks_for_portable_gpu_kernels() {
  static const bool asks = choice_of_environment("MIXED_ATTENTION_GPU", {"portable"}) == "portable";
  return asks;
}

}  // namespace mixed_attention
