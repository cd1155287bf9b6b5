#include "cuda/hopper/split_fp16/half_limbs.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <stdexcept>

#include "cuda/hopper/split_fp16/half_pair.cuh"
#include "cuda/hopper/tile/launch_kernel.cuh"
#include "cuda/ptx/dependent_grids.cuh"

namespace mixed_attention::cuda::hopper {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 8;  // numbers of a thread, 16 bytes of either limb
constexpr int64_t kMaxGridDepth = 65535;

struct HalfLimbsParams {
  HalfLimbsTask tasks[kMaxHalfLimbsTasks];
  int threads_of_row;  // a power of two: those of a warp that share a row, some of them perhaps without numbers
};

__device__ inline void load_chunk(float (&x)[kChunk], const float* source) {
  if (reinterpret_cast<uintptr_t>(source) % sizeof(float4) == 0) {
    reinterpret_cast<float4&>(x[0]) = reinterpret_cast<const float4*>(source)[0];
    reinterpret_cast<float4&>(x[4]) = reinterpret_cast<const float4*>(source)[1];
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = source[i];
  }
}

// 2^exponent, of a normal number.
__device__ inline float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// The exponent of a row's row_scale; largest: of the row's finite numbers. row_scales and their inverses are normal
// numbers.
__device__ inline int row_scale_exponent(float largest) {
  return max((__float_as_int(largest) >> 23) - 127 - 14, -126);
}

// Infinity in two limbs is 1 in high and infinity in low, with its sign. What the other factor is missing in its own
// high limb, perhaps nothing, or less than nothing, is multiplied by high alone, and does not make a NaN of infinity.
__device__ inline void keep_infinities(HalfPair<2>& pair, float a, float b) {
  constexpr uint32_t kOne = 0x3c00, kInfinity = 0x7c00, kSign = 0x8000, kHalf = 0xffff;
  const auto keep = [&](float x, int shift) {
    if (!isinf(x)) return;
    const uint32_t sign = x < 0 ? kSign : 0;
    pair.limbs[0] = (pair.limbs[0] & ~(kHalf << shift)) | (kOne | sign) << shift;
    pair.limbs[1] = (pair.limbs[1] & ~(kHalf << shift)) | (kInfinity | sign) << shift;
  };
  keep(a, 0);
  keep(b, 16);
}

// A block takes some rows of one head; blockIdx.y is the task.
__global__ void __launch_bounds__(kThreads) hopper_half_limbs_kernel(const __grid_constant__ HalfLimbsParams params) {
  ptx::allow_next_grid();
  ptx::wait_for_grids_before();
  const TensorView& source = params.tasks[blockIdx.y].source;
  const HalfLimbs& target = params.tasks[blockIdx.y].target;
  const int head = blockIdx.x % static_cast<unsigned>(source.num_heads);
  const int rows_of_block = kThreads / params.threads_of_row;
  const int64_t row = int64_t{blockIdx.x} / source.num_heads * rows_of_block + threadIdx.x / params.threads_of_row;
  const int column = threadIdx.x % params.threads_of_row * kChunk;
  const bool exists = row < source.seqlen && column < source.head_dim;

  for (int64_t sequence = blockIdx.z; sequence < target.num_sequences; sequence += gridDim.z) {
    float x[kChunk] = {};
    if (exists) {
      load_chunk(x, static_cast<const float*>(source.data) + sequence * source.strides.batch +
                        row * source.strides.row + head * source.strides.head + column);
    }
    float largest = 0;
#pragma unroll
    for (float number : x) largest = fmaxf(largest, isfinite(number) ? fabsf(number) : 0.f);
    for (int distance = params.threads_of_row / 2; distance > 0; distance /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, distance));
    }
    if (!exists) continue;

    const int exponent = row_scale_exponent(largest);
    const float inverse = power_of_two(-exponent);
    HalfPair<2> pairs[kChunk / 2];
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      pairs[i] = HalfPair<2>::split(x[2 * i] * inverse, x[2 * i + 1] * inverse);
      if (target.num_limbs == 2) keep_infinities(pairs[i], x[2 * i], x[2 * i + 1]);
    }
    const int64_t limb_size = target.num_sequences * source.seqlen * source.num_heads * source.head_dim;
    __half* chunk = static_cast<__half*>(target.limbs) +
                    ((sequence * source.seqlen + row) * source.num_heads + head) * source.head_dim + column;
#pragma unroll
    for (int limb = 0; limb < 2; ++limb) {
      if (limb == target.num_limbs) break;
      *reinterpret_cast<uint4*>(chunk + limb * limb_size) =
          uint4{pairs[0].limbs[limb], pairs[1].limbs[limb], pairs[2].limbs[limb], pairs[3].limbs[limb]};
    }
    if (column == 0) {
      target.row_scales[(sequence * source.num_heads + head) * source.seqlen + row] = power_of_two(exponent);
    }
  }
}

}  // namespace

void launch_half_limbs(std::span<const HalfLimbsTask> tasks, void* stream) {
  if (tasks.size() > kMaxHalfLimbsTasks) throw std::logic_error("launch_half_limbs: too many tasks");
  HalfLimbsParams params{};
  std::copy(tasks.begin(), tasks.end(), params.tasks);
  int64_t widest = 0;
  for (const HalfLimbsTask& task : tasks) widest = std::max(widest, task.source.head_dim);
  params.threads_of_row = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(widest / kChunk)));
  const int64_t rows_of_block = kThreads / params.threads_of_row;
  int64_t num_blocks = 0, depth = 0;
  for (const HalfLimbsTask& task : tasks) {
    const int64_t blocks_of_head = (task.source.seqlen + rows_of_block - 1) / rows_of_block;
    num_blocks = std::max(num_blocks, blocks_of_head * task.source.num_heads);
    depth = std::max<int64_t>(depth, task.target.num_sequences);
  }
  const dim3 grid(static_cast<unsigned>(num_blocks), static_cast<unsigned>(tasks.size()),
                  static_cast<unsigned>(std::min(depth, kMaxGridDepth)));
  launch_kernel<hopper_half_limbs_kernel>("launch of hopper_half_limbs_kernel", {grid, kThreads}, stream, params);
}

}  // namespace mixed_attention::cuda::hopper
