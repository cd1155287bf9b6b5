// Stands in for the header of this name: a barrier that is never waited for, and whose value is the number of bytes
// that it expects and that have not come.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace mixed_attention::cuda::ptx {

using Mbarrier = uint64_t;

inline void mbarrier_init(Mbarrier& barrier, int) { barrier = 0; }
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(Mbarrier&) {}
inline void mbarrier_wait(Mbarrier&, uint32_t) {}

inline void mbarrier_arrive_expect(Mbarrier& barrier, int bytes) {
  if (barrier != 0) throw std::logic_error("a barrier expects a copy while it lacks bytes of the one before");
  barrier = static_cast<uint64_t>(bytes);
}

inline void mbarrier_complete(Mbarrier& barrier, int bytes) {
  if (barrier < static_cast<uint64_t>(bytes))
    throw std::logic_error("a copy brings more bytes than its barrier expects");
  barrier -= static_cast<uint64_t>(bytes);
}

}  // namespace mixed_attention::cuda::ptx
