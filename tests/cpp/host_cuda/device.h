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

// Which block a thread of the host is.
inline thread_local host_cuda::Index blockIdx, gridDim;

using std::max;
using std::min;
