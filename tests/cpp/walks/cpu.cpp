// The work items of the CPU kernels, taken by an instruction set that notes what it is asked for.
#define MIXED_ATTENTION_ISA notes
#define MIXED_ATTENTION_VECTOR_BYTES 16
#define MIXED_ATTENTION_VECTOR_REGISTERS 16
#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/simd/keys.h"
#include "params.h"
#include "visits.h"

namespace walks {
namespace {

namespace cpu = ma::cpu;

// What the kernels of the calling thread note.
struct Notes {
  Visits visits;
  Rows stored, stored_keys;  // rows of the output or dq, rows of dk and dv
  int64_t num_heads;
};
thread_local Notes* notes = nullptr;

// As the kernel gathers keys (simd/fwd_kernel.h): neighbours among them are visited at once.
void visit(int64_t sequence, ma::Range rows, const cpu::notes::Key* keys, int64_t count) {
  for (int64_t i = 0; i < count;) {
    const int64_t begin = keys[i].row;
    int64_t end = begin;
    for (; i < count && keys[i].row == end; ++i) ++end;
    notes->visits.add(sequence, rows, {begin, end});
  }
}

void walk_keys(const ma::AttentionParams& params, const cpu::FwdItem& item) {
  expect(0 < item.rows.size() && item.rows.size() <= cpu::kFwdBlockM, "an item has no rows or too many");
  const int64_t sequence = item.batch * notes->num_heads + item.head;
  cpu::notes::Key keys[cpu::kFwdBlockN];
  cpu::notes::KeyCursor cursor(item.keys, item.num_key_ranges, cpu::notes::mask_of(params, item.batch));
  while (const int64_t count = cursor.next(keys, cpu::kFwdBlockN)) visit(sequence, item.rows, keys, count);
  notes->stored.add(sequence, item.rows);
}

void fwd(const ma::FwdParams& params, const cpu::FwdItem& item, void*) { walk_keys(params, item); }

void jvp(const ma::JvpParams& params, const cpu::FwdItem& item, const void*, const void*, void*) {
  walk_keys(params, item);
}

void delta(const ma::BwdParams&, int64_t, int64_t, ma::Range, void*) {}

// As BwdTile::run (simd/bwd_kernel.h) goes, with items one after the other: a counter that is not yet at a visit's rank
// would be waited for without end.
void walk_queries(const ma::AttentionParams& params, const cpu::BwdShared& shared, const cpu::BwdItem& item) {
  expect(0 < item.keys.size() && item.keys.size() <= cpu::kBwdBlockN, "an item has no keys or too many");
  const int64_t sequence = item.batch * notes->num_heads + item.head;
  cpu::notes::Key keys[cpu::kBwdBlockN];
  cpu::notes::KeyCursor cursor(&item.keys, 1, cpu::notes::mask_of(params, item.batch));
  const int64_t count = cursor.next(keys, cpu::kBwdBlockN);
  for (int64_t i = 0; i < item.num_visits; ++i) {
    const cpu::Visit& reading = item.visits[i];
    int* progress = shared.progress + sequence * shared.tiles_per_head + reading.first_tile;
    for (int64_t begin = reading.queries.begin; begin < reading.queries.end; begin += cpu::kBwdBlockM, ++progress) {
      const ma::Range rows{begin, std::min(begin + cpu::kBwdBlockM, reading.queries.end)};
      visit(sequence, rows, keys, count);
      expect(*progress == reading.rank, "an item waits for a turn to add to dq that never comes");
      *progress = reading.rank + 1;
      if (reading.is_last) notes->stored.add(sequence, rows);
    }
  }
  notes->stored_keys.add(sequence, item.keys);
}

void bwd(const ma::BwdParams& params, const cpu::BwdShared& shared, const cpu::BwdItem& item, void*) {
  walk_queries(params, shared, item);
}

void bwd_jvp_rows(const ma::BwdJvpParams&, int64_t, int64_t, ma::Range, void*, int64_t, void*) {}

void bwd_jvp(const ma::BwdJvpParams& params, const cpu::BwdShared& shared, const cpu::BwdJvpShared&,
             const cpu::BwdItem& item, void*) {
  walk_queries(params, shared, item);
}

void rope(const ma::RopeParams&, int64_t, ma::Range) {}

void rms_rope(const ma::RmsRopeParams&, int64_t, ma::Range) {}
void rope_jvp(const ma::RopeJvpParams&, int64_t, ma::Range) {}
void rope_backward(const ma::RopeBwdParams&, int64_t, ma::Range) {}

// Only rows of large scores are measured.
void measure(const ma::AttentionParams&, const cpu::FwdItem&, void*, void*, void*) {}

const cpu::AttentionKernels kNotes{8,       8,    fwd,      measure,  delta,        bwd, jvp, bwd_jvp_rows,
                                   bwd_jvp, rope, rms_rope, rope_jvp, rope_backward};

// What a plan lists but for masked keys.
Visits listed_visits(const Problem& problem, const std::vector<char>& mask) {
  Visits visits;
  for (int64_t sequence = 0; sequence < problem.num_sequences(); ++sequence) {
    const char* visible = mask.data() + sequence / problem.num_heads * problem.seqlen_k;
    int64_t begin = 0;
    for (const Segment& segment : problem.segments) {
      const ma::Range rows{begin, begin += segment.num_rows};
      for (const ma::Range& keys : segment.keys) {
        for (int64_t key = keys.begin; key < keys.end;) {
          int64_t end = key;
          while (end < keys.end && visible[end]) ++end;
          visits.add(sequence, rows, {key, end});
          for (key = end; key < keys.end && !visible[key];) ++key;
        }
      }
    }
  }
  return visits;
}

// Runs of visible and of masked keys, some longer than a tile.
std::vector<char> make_mask(const Problem& problem) {
  std::vector<char> mask(problem.batch_size * problem.seqlen_k, 1);
  uint64_t state = problem.dice[15];
  for (size_t i = 0; i < mask.size();) {
    state = state * 6364136223846793005 + 1442695040888963407;
    const uint64_t length = (state >> 33) % ((state >> 60) < 4 ? 300 : 8) + 1;
    const char is_visible = state >> 32 & 1;
    for (uint64_t j = 0; j < length && i < mask.size(); ++j) mask[i++] = is_visible;
  }
  return mask;
}

// Runs a pass that walks keys, and holds what its kernels note against the plan.
template <class Run>
void check_forward(const Problem& problem, const Visits& listed, const char* pass, Run run) {
  Notes noted{{}, {}, {}, problem.num_heads};
  notes = &noted;
  run();
  noted.visits.expect_equal(listed, pass);
  noted.stored.expect_all(problem.num_sequences(), problem.seqlen_q(), pass);
}

// The same for a pass that walks queries and calls run(dq, dq_strides).
template <class Run>
void check_backward(const Problem& problem, const Visits& listed, const char* pass, Run run) {
  Notes noted{{}, {}, {}, problem.num_heads};
  notes = &noted;
  const int64_t seqlen_q = problem.seqlen_q();
  std::vector<double> dq(problem.num_sequences() * seqlen_q, 1);
  run(dq.data(), ma::Strides{problem.num_heads * seqlen_q, 1, seqlen_q});
  // Rows that no item visits are set to zero by the caller.
  for (int64_t i = 0; i < static_cast<int64_t>(dq.size()); ++i) {
    const int64_t row = i % seqlen_q;
    if (dq[i] == 0) noted.stored.add(i / seqlen_q, {row, row + 1});
  }
  noted.visits.expect_equal(listed, pass);
  noted.stored.expect_all(problem.num_sequences(), seqlen_q, pass);
  noted.stored_keys.expect_all(problem.num_sequences(), problem.seqlen_k, pass);
}

}  // namespace

void check_cpu(const Problem& problem) {
  const ma::Schedule schedule = schedule_of(problem);
  const bool is_masked = problem.choose(4, 3) == 0;
  const std::vector<char> mask = is_masked ? make_mask(problem) : std::vector<char>();
  ma::BwdParams params{};
  fill(params, problem, schedule, ma::DType::kFloat64, 1, false);
  params.key_padding_mask = is_masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr;
  params.key_padding_mask_batch_stride = problem.seqlen_k;
  params.num_threads = 1;
  const Visits listed = is_masked ? listed_visits(problem, mask) : walks::listed_visits(problem);

  const std::vector<double> lse(problem.num_sequences() * problem.seqlen_q(), 0);  // no row is measured anew
  const int count = static_cast<int>(problem.choose(6, ma::kMaxTangents)) + 1;     // by which items are cut as well
  ma::FwdParams fwd{static_cast<const ma::AttentionParams&>(params)};
  fwd.num_threads = static_cast<int>(problem.choose(5, {1, 64}));  // likewise
  fwd.parallel_for = [](int num_workers, void (*task)(int, void*), void* context) {
    for (int worker = 0; worker < num_workers; ++worker) task(worker, context);
  };
  check_forward(problem, listed, "forward on the CPU", [&] { cpu::run_fwd(fwd); });
  check_forward(problem, listed, "tangents on the CPU", [&] {
    ma::JvpParams jvp{fwd};
    jvp.tangents.count = count;
    cpu::run_jvp(jvp);
  });

  params.lse = lse.data();
  check_backward(problem, listed, "backward on the CPU", [&](double* dq, const ma::Strides& strides) {
    params.dq = dq;
    params.dq_strides = strides;
    cpu::run_bwd(params, /*wide_keys=*/false);
  });
  check_backward(problem, listed, "gradients of tangents on the CPU", [&](double* dq, const ma::Strides& strides) {
    ma::BwdJvpParams bwd_jvp{params};
    bwd_jvp.tangents.count = count;
    bwd_jvp.dq = dq;
    bwd_jvp.dq_strides = strides;
    cpu::run_bwd_jvp(bwd_jvp);
  });
}

}  // namespace walks

namespace mixed_attention::cpu {

const InstructionSet& selected_instruction_set() {
  static const InstructionSet notes{
      "notes", [] { return true; }, {walks::kNotes, walks::kNotes, walks::kNotes, walks::kNotes}};
  return notes;
}

const AttentionKernels& attention_kernels(const AttentionParams& params) {
  return selected_instruction_set().kernels[static_cast<int>(params.dtype)];
}

}  // namespace mixed_attention::cpu
