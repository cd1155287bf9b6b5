// The kernels for any machine: vectors of 16 bytes, which every compiler target has or splits.
#define MIXED_ATTENTION_ISA portable
#define MIXED_ATTENTION_VECTOR_BYTES 16
#define MIXED_ATTENTION_VECTOR_REGISTERS 16
#include "cpu/simd/table.h"

namespace mixed_attention::cpu {

const InstructionSet kPortable = portable::instruction_set("portable", [] { return true; });

}  // namespace mixed_attention::cpu
