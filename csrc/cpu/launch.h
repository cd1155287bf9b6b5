// The CPU kernels' entry points.
#pragma once

#include "derivatives_params.h"
#include "params.h"

namespace mixed_attention::cpu {

void run_fwd(const FwdParams& params);
// wide_keys: whether dk and dv are tensors of the dtype that is computed in, fp32 beside 16 bits.
void run_bwd(const BwdParams& params, bool wide_keys);
void run_jvp(const JvpParams& params);
void run_bwd_jvp(const BwdJvpParams& params);
void run_rope(const RopeParams& params);
void run_rms_rope(const RmsRopeParams& params);
void run_rope_jvp(const RopeJvpParams& params);
void run_rope_backward(const RopeBwdParams& params);

// Name of the instruction set that the kernels use on this machine: "AMX", "AVX512_BF16", "AVX512", "AVX2" or
// "portable". Throws std::invalid_argument where MIXED_ATTENTION_CPU asks for one that the machine does not offer.
const char* instruction_set();

}  // namespace mixed_attention::cpu
