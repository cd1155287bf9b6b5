// Brings small tables to the device without a host buffer that would have to outlive the call.
#pragma once

#include <cstddef>

namespace mixed_attention::cuda {

// Enqueues copies of `bytes`, a multiple of 4, to device memory on a stream (cudaStream_t). The bytes travel in kernel
// parameters: nothing synchronises, and a CUDA graph that captures the call owns them.
void upload(void* target, const void* source, size_t bytes, void* stream);

}  // namespace mixed_attention::cuda
