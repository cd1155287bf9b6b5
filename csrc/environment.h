// What users ask for by environment variables. Read once a process.
#pragma once

#include <string>
#include <vector>

namespace mixed_attention {

// The value of a variable, one of `expected`; empty where the variable is not set, or set to nothing. Throws
// std::invalid_argument that names the variable, what was expected (remark: in what sense) and what was got.
std::string choice_of_environment(const char* variable, const std::vector<std::string>& expected,
                                  const std::string& remark = "");

// Whether MIXED_ATTENTION_GPU leaves all but the portable kernels out on every GPU: for comparisons, and where others
// are under suspicion. Throws std::invalid_argument where the variable asks for what there is not.
bool asks_for_portable_gpu_kernels();

}  // namespace mixed_attention
