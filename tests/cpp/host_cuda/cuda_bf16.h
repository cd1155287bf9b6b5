// Stands in for CUDA's header of this name: a type of the right size.
#pragma once

struct __nv_bfloat16 {
  unsigned short bits;
};
