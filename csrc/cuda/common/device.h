// Facts about a device that decide how work is cut. Read once a device.
#pragma once

namespace mixed_attention::cuda {

int num_multiprocessors(int device);

// 10 * major + minor.
int compute_capability(int device);

}  // namespace mixed_attention::cuda
