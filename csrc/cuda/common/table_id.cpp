#include "cuda/common/table_id.h"

#include <atomic>

namespace mixed_attention::cuda {

uint64_t new_table_id() {
  static std::atomic<uint64_t> last = 0;
  return ++last;
}

}  // namespace mixed_attention::cuda
