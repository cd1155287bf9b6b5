// By what tables are known to the stores on devices.
#pragma once

#include <cstdint>

namespace mixed_attention::cuda {

// An id that no other table of this process has, whatever kernels it is for: all lie in the same stores.
uint64_t new_table_id();

}  // namespace mixed_attention::cuda
