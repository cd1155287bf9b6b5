// What the launchers of both passes share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/allow_shared_memory.cuh"
#include "cuda/common/check.h"
#include "cuda/portable/plan.h"
#include "cuda/portable/tile_iterator.cuh"
#include "cuda/portable/upload.h"

namespace mixed_attention::cuda::portable {

// Whether every row of a (batch, seqlen, heads, cols) tensor starts at a multiple of 16 bytes.
inline bool is_aligned(const void* data, const Strides& strides, int element_size) {
  const int64_t step = 16 / element_size;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch % step == 0 && strides.row % step == 0 &&
         strides.head % step == 0;
}

// The table as a kernel parameter; a table too large for that is enqueued to be brought to the device.
inline InlineWork bring(const Pass& pass, void* stream) {
  InlineWork in_parameters;
  if (pass.table.segments == nullptr) {
    std::copy(pass.host.segments.begin(), pass.host.segments.end(), in_parameters.segments);
    std::copy(pass.host.ranges.begin(), pass.host.ranges.end(), in_parameters.ranges);
  } else {
    upload(const_cast<WorkSegment*>(pass.table.segments), pass.host.segments.data(),
           pass.host.segments.size() * sizeof(WorkSegment), stream);
    upload(const_cast<WorkRange*>(pass.table.ranges), pass.host.ranges.data(),
           pass.host.ranges.size() * sizeof(WorkRange), stream);
  }
  return in_parameters;
}

inline unsigned blocks_for(int64_t threads, int block_size) {
  return static_cast<unsigned>((threads + block_size - 1) / block_size);
}

}  // namespace mixed_attention::cuda::portable
