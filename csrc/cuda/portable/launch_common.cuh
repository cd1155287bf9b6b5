// What the launchers of both passes share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/allow_shared_memory.cuh"
#include "cuda/common/check.h"
#include "cuda/portable/device_tables.h"
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

// A table as a kernel gets it: in its parameters, or on the device, where nobody else overwrites it before what is
// enqueued while this lives.
struct Brought {
  WorkTable table;
  InlineWork in_parameters;
  HeldTable held;
};

// Enqueues what a table too large for the parameters of a kernel needs to be on the device.
inline Brought bring(const PassOfCall& call, const AttentionParams& params) {
  const HostWork& host = call.pass->host;
  Brought brought;
  brought.table = {nullptr, nullptr, static_cast<int32_t>(host.segments.size()), static_cast<int32_t>(host.num_tiles),
                   call.pass->num_splits};
  if (host.fits_inline()) {
    std::copy(host.segments.begin(), host.segments.end(), brought.in_parameters.segments);
    std::copy(host.ranges.begin(), host.ranges.end(), brought.in_parameters.ranges);
    return brought;
  }
  const auto bring_to = [&](char* memory) {
    upload(memory, host.segments.data(), host.segments.size() * sizeof(WorkSegment), params.stream);
    upload(memory + host.segment_bytes(), host.ranges.data(), host.ranges.size() * sizeof(WorkRange), params.stream);
  };
  brought.held = hold_table(call.pass->id, host.device_bytes(), params.device, params.stream, bring_to);
  char* memory = brought.held.memory;
  if (memory == nullptr) bring_to(memory = call.table);
  brought.table.segments = reinterpret_cast<const WorkSegment*>(memory);
  brought.table.ranges = reinterpret_cast<const WorkRange*>(memory + host.segment_bytes());
  return brought;
}

inline unsigned blocks_for(int64_t threads, int block_size) {
  return static_cast<unsigned>((threads + block_size - 1) / block_size);
}

}  // namespace mixed_attention::cuda::portable
