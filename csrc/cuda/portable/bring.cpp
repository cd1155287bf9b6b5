#include "cuda/portable/bring.h"

#include <algorithm>

#include "cuda/common/upload.h"

namespace mixed_attention::cuda::portable {

Brought bring(const PassOfCall& call, const AttentionParams& params) {
  const Pass& pass = *call.pass;
  const HostWork& host = pass.host;
  Brought brought;
  GridWork& work = brought.work;
  work.table = {nullptr, nullptr, static_cast<int32_t>(host.segments.size()), static_cast<int32_t>(host.num_tiles),
                pass.num_splits};
  work.grid = pass.grid(params.batch_size * params.num_heads);
  if (host.fits_inline()) {
    std::copy(host.segments.begin(), host.segments.end(), work.in_parameters.segments);
    std::copy(host.ranges.begin(), host.ranges.end(), work.in_parameters.ranges);
    return brought;
  }
  if (work.grid == 0) return brought;
  const auto bring_to = [&](char* memory, void* stream) {
    upload(memory, host.segments.data(), host.segments.size() * sizeof(WorkSegment), stream);
    upload(memory + host.segment_bytes(), host.ranges.data(), host.ranges.size() * sizeof(WorkRange), stream);
  };
  brought.held = hold_table(pass.id, host.device_bytes(), params.device, params.stream, bring_to);
  char* memory = brought.held.memory;
  if (memory == nullptr) bring_to(memory = call.table, params.stream);
  work.table.segments = reinterpret_cast<const WorkSegment*>(memory);
  work.table.ranges = reinterpret_cast<const WorkRange*>(memory + host.segment_bytes());
  return brought;
}

}  // namespace mixed_attention::cuda::portable
