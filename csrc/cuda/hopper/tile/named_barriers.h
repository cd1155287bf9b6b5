// The named barriers of the Hopper kernels, by number; 0 is __syncthreads. Where every consumer has a barrier of its
// own, this is the first consumer's; the others' follow.
#pragma once

namespace mixed_attention::cuda::hopper {

enum NamedBarrier : int {
  kTurnBarrier = 1,                  // forward: it is the consumer's turn to issue its MMAs
  kDqStagingBarrier = 1,             // dk and dv: the third warpgroup and its buffer for dq
  kDqStagingBarrierBesideTurns = 3,  // double backward: the same, behind the turns of two consumers
  kRelatesBarrier = 1,               // dq in fp32: whether a row of the consumer has a reference
  kRareItemBarrier = 8,              // dk and dv: whether an item of the consumer is rare
};

// Forward: whether a row of the consumer overflows. Those of the turns come before.
constexpr int vote_barrier(int num_consumers) { return kTurnBarrier + num_consumers; }

}  // namespace mixed_attention::cuda::hopper
