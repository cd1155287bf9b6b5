#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/common/check.h"
#include "cuda/common/upload.h"

namespace mixed_attention::cuda {
namespace {

struct Chunk {
  static constexpr int kWords = 960;  // kernel parameters hold 4 KiB
  uint32_t words[kWords];
};

__global__ void upload_kernel(uint32_t* target, const __grid_constant__ Chunk chunk, int num_words) {
  for (int i = threadIdx.x; i < num_words; i += blockDim.x) target[i] = chunk.words[i];
}

}  // namespace

void upload(void* target, const void* source, size_t bytes, void* stream) {
  auto* words = static_cast<uint32_t*>(target);
  const auto* from = static_cast<const char*>(source);
  for (size_t done = 0; done < bytes; done += sizeof(Chunk)) {
    Chunk chunk;
    const size_t size = std::min(bytes - done, sizeof(Chunk));
    std::memcpy(chunk.words, from + done, size);
    upload_kernel<<<1, 256, 0, static_cast<cudaStream_t>(stream)>>>(words + done / 4, chunk,
                                                                    static_cast<int>(size / 4));
    check(cudaGetLastError(), "upload_kernel");
  }
}

}  // namespace mixed_attention::cuda
