// Stands in for CUDA's header of this name: the parameters of kernels have room for maps, which no test looks into.
#pragma once

struct alignas(64) CUtensorMap {
  unsigned char bytes[128];
};
