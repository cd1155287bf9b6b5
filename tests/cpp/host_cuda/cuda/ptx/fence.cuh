// Stands in for the header of this name: on the host there is one way to reach memory.
#pragma once

namespace mixed_attention::cuda::ptx {

inline void fence_async_shared() {}
inline void fence_async_global() {}

}  // namespace mixed_attention::cuda::ptx
