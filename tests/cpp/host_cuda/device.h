// What device code needs of nvcc's language for a host compiler to read it: the walks of the kernels run in tests as
// they stand, block by block. Included before everything else (CMakeLists.txt).
#pragma once

#include <algorithm>

#define __device__
#define __global__

namespace host_cuda {

struct Index {
  unsigned x;
};

}  // namespace host_cuda

// Which block a thread of the host is, and that it is alone in it.
inline thread_local host_cuda::Index blockIdx, gridDim, threadIdx{0}, blockDim{1};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline void __syncwarp() {}
inline bool __any_sync(unsigned, bool predicate) { return predicate; }
inline int __shfl_sync(unsigned, int value, int) { return value; }
inline unsigned atomicAdd(unsigned* counter, unsigned number) { return (*counter += number) - number; }
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xFFFF, b & 0xFFFF);
}

using std::max;
using std::min;
