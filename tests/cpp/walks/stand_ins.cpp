// What the host code of the CUDA kernels asks of a device, without one.
#include "cuda/common/device.h"
#include "cuda/hopper/mask/mask.h"
#include "problem.h"

namespace mixed_attention::cuda {

int num_multiprocessors(int) { return walks::multiprocessors_of_device; }

int compute_capability(int) { return 90; }

namespace hopper {

// No walk depends on where copies of masked keys lie.
MaskedKeys plan_masked_keys(const AttentionParams&, Scratch&, bool) { return {}; }

}  // namespace hopper
}  // namespace mixed_attention::cuda
