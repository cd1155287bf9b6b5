#include "cuda/cuda_check.h"
#include "cuda/hopper/mask.h"

namespace mixed_attention::cuda::hopper {
namespace {

constexpr int kKeys = 32;  // of a block
constexpr int kThreads = 256;
constexpr int kChunk = 8;  // elements in 16 bytes

// A block writes the word of 32 keys, and their values.
__global__ void hopper_mask_kernel(const AttentionParams params, const MaskedKeys keys) {
  const int64_t copy = blockIdx.x / keys.num_words;
  const int word = blockIdx.x % keys.num_words;
  const int64_t first = int64_t{word} * kKeys;
  const int64_t key = first + threadIdx.x % 32;
  const bool is_visible =
      key < params.seqlen_k && params.key_padding_mask[copy * params.key_padding_mask_batch_stride + key];
  const uint32_t bits = __ballot_sync(0xffffffff, is_visible);
  if (threadIdx.x == 0) keys.visible[blockIdx.x] = bits;

  const int num_rows = static_cast<int>(min(int64_t{kKeys}, params.seqlen_k - first));  // negative in spare words
  const int chunks_of_head = static_cast<int>(params.head_dim) / kChunk;
  const int chunks_of_row = static_cast<int>(params.num_heads) * chunks_of_head;
  const auto* source = static_cast<const uint16_t*>(params.v) + copy * params.v_strides.batch;
  uint4* target = static_cast<uint4*>(keys.values) + (copy * params.seqlen_k + first) * chunks_of_row;
  for (int i = threadIdx.x; i < num_rows * chunks_of_row; i += kThreads) {
    const int row = i / chunks_of_row;
    const int chunk = i % chunks_of_row;
    const auto* values = source + (first + row) * params.v_strides.row +
                         chunk / chunks_of_head * params.v_strides.head + chunk % chunks_of_head * kChunk;
    target[i] = bits >> row & 1 ? *reinterpret_cast<const uint4*>(values) : uint4{};
  }
}

}  // namespace

void launch_mask(const AttentionParams& params, const MaskedKeys& keys) {
  hopper_mask_kernel<<<static_cast<unsigned>(keys.num_copies) * keys.num_words, kThreads, 0,
                       static_cast<cudaStream_t>(params.stream)>>>(params, keys);
  check(cudaGetLastError(), "launch of hopper_mask_kernel");
}

}  // namespace mixed_attention::cuda::hopper
