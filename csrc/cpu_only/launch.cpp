// What stands for the CUDA kernels in a build without them. So every other file is compiled the same in either build,
// and one's objects serve the other. No operator has a CUDA implementation then, and what would run a kernel is not
// called.
#include "cuda/launch.h"

#include <stdexcept>

namespace mixed_attention::cuda {
namespace {

constexpr const char* kReason = "built without CUDA kernels; rebuild with MIXED_ATTENTION_CUDA=1";

[[noreturn]] void refuse() { throw std::logic_error(kReason); }

}  // namespace

bool is_built() { return false; }

Choice choose_fwd(const Problem&) { return {Choice::Family::kNone, kReason}; }
Choice choose_bwd(const Problem&) { return {Choice::Family::kNone, kReason}; }

std::string refusal_of_sizes(const FwdParams&) { refuse(); }
std::string refusal_of_sizes(const BwdParams&) { refuse(); }

Launch<FwdParams> plan_fwd(const FwdParams&) { refuse(); }
Launch<BwdParams> plan_bwd(const BwdParams&) { refuse(); }

void run_rope(const RopeParams&) { refuse(); }
void run_rms_rope(const RmsRopeParams&) { refuse(); }
void run_cast(const CastParams&) { refuse(); }

}  // namespace mixed_attention::cuda
