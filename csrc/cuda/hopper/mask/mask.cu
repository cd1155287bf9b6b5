#include "cuda/hopper/mask/mask.h"
#include "cuda/hopper/tile/launch_kernel.cuh"
#include "cuda/ptx/dependent_grids.cuh"

namespace mixed_attention::cuda::hopper {
namespace {

constexpr int kKeys = 32;  // of a block
constexpr int kThreads = 256;
constexpr int kChunk = 8;  // elements in 16 bytes

// Copies 32 keys' rows, those of which the bit is set, and leaves zeros in place of the others.
__device__ void copy_unmasked_rows(const AttentionParams& params, const void* tensor, int64_t head_dim,
                                   const Strides& strides, void* copies, int64_t sequence, int64_t first,
                                   uint32_t bits) {
  const int num_rows = static_cast<int>(min(int64_t{kKeys}, params.seqlen_k - first));  // negative in spare words
  const int chunks_of_head = static_cast<int>(head_dim) / kChunk;
  const int chunks_of_row = static_cast<int>(params.num_heads) * chunks_of_head;
  const auto* source = static_cast<const uint16_t*>(tensor) + sequence * strides.batch;
  uint4* target = static_cast<uint4*>(copies) + (sequence * params.seqlen_k + first) * chunks_of_row;
  for (int i = threadIdx.x; i < num_rows * chunks_of_row; i += kThreads) {
    const int row = i / chunks_of_row;
    const int chunk = i % chunks_of_row;
    const auto* elements =
        source + (first + row) * strides.row + chunk / chunks_of_head * strides.head + chunk % chunks_of_head * kChunk;
    target[i] = bits >> row & 1 ? *reinterpret_cast<const uint4*>(elements) : uint4{};
  }
}

// A block writes the word of 32 keys, and what belongs to them.
__global__ void hopper_mask_kernel(const AttentionParams params, const MaskedKeys keys) {
  ptx::allow_next_grid();
  ptx::wait_for_grids_before();
  const int64_t sequence = blockIdx.x / keys.num_words;
  const int word = blockIdx.x % keys.num_words;
  const int64_t first = int64_t{word} * kKeys;
  const int64_t key = first + threadIdx.x % 32;
  const bool is_unmasked =
      key < params.seqlen_k && params.key_padding_mask[sequence * params.key_padding_mask_batch_stride + key];
  const uint32_t bits = __ballot_sync(0xffffffff, is_unmasked);
  if (threadIdx.x == 0) keys.key_mask_bits[blockIdx.x] = bits;
  copy_unmasked_rows(params, params.v, params.head_dim_v, params.v_strides, keys.values, sequence, first, bits);
  if (keys.keys == nullptr) return;
  copy_unmasked_rows(params, params.k, params.head_dim, params.k_strides, keys.keys, sequence, first, bits);
}

}  // namespace

MaskedKeys plan_masked_keys(const AttentionParams& params, Scratch& scratch, bool copies_keys) {
  const bool serves_all = params.key_padding_mask_batch_stride == 0 && params.v_strides.batch == 0 &&
                          (!copies_keys || params.k_strides.batch == 0);
  MaskedKeys keys{};
  keys.num_sequences = serves_all ? 1 : static_cast<int>(params.batch_size);
  keys.num_words = static_cast<int>((params.seqlen_k + kKeys - 1) / kKeys) + MaskedKeys::kSpareWords;
  const int64_t num_rows = keys.num_sequences * params.seqlen_k * params.num_heads;
  keys.key_mask_bits = scratch.take<uint32_t>(int64_t{keys.num_sequences} * keys.num_words);
  keys.values = scratch.take<uint16_t>(num_rows * params.head_dim_v);
  if (copies_keys) keys.keys = scratch.take<uint16_t>(num_rows * params.head_dim);
  return keys;
}

TensorView masked_view(const AttentionParams& params, const MaskedKeys& keys, const void* copy, int64_t head_dim) {
  const int64_t row = params.num_heads * head_dim;
  const Strides strides{keys.num_sequences > 1 ? params.seqlen_k * row : 0, row, head_dim};
  return {copy, params.dtype, keys.num_sequences, params.seqlen_k, params.num_heads, head_dim, strides};
}

void launch_mask(const AttentionParams& params, const MaskedKeys& keys) {
  launch_kernel<hopper_mask_kernel>("launch of hopper_mask_kernel", {keys.num_sequences * keys.num_words, kThreads},
                                    params.stream, params, keys);
}

}  // namespace mixed_attention::cuda::hopper
