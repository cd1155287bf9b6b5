// What stands for the CUDA kernels where none are linked. So every other file is compiled the same in either build, and
// one's objects serve the other.
#include "cuda/interface.h"

const mixed_attention::cuda::Interface* mixed_attention_kernels() { return nullptr; }
