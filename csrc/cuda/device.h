// Facts about a device that decide how work is cut, read once a device, and about a stream.
#pragma once

namespace mixed_attention::cuda {

int num_multiprocessors(int device);

// 10 * major + minor.
int compute_capability(int device);

// Whether what is enqueued becomes part of a graph.
bool is_capturing(void* stream);

}  // namespace mixed_attention::cuda
