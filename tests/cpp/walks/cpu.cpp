// The tasks of the CPU kernels, taken by an instruction set that notes what it is asked for.
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

void fwd(const ma::FwdParams& params, const cpu::FwdTask& task, void*) {
  expect(0 < task.rows.size() && task.rows.size() <= cpu::kFwdBlockM, "a task has no rows or too many");
  const int64_t sequence = task.batch * notes->num_heads + task.head;
  cpu::notes::Key keys[cpu::kFwdBlockN];
  cpu::notes::KeyCursor cursor(task.keys, task.num_key_ranges, cpu::notes::mask_of(params, task.batch));
  while (const int64_t count = cursor.next(keys, cpu::kFwdBlockN)) visit(sequence, task.rows, keys, count);
  notes->stored.add(sequence, task.rows);
}

void delta(const ma::BwdParams&, int64_t, int64_t, ma::Range, void*) {}

// As BwdTile::run (simd/bwd_kernel.h) goes, with tasks one after the other: a counter that is not yet at a visit's rank
// would be waited for without end.
void bwd(const ma::BwdParams& params, const cpu::BwdShared& shared, const cpu::BwdTask& task, void*) {
  expect(0 < task.keys.size() && task.keys.size() <= cpu::kBwdBlockN, "a task has no keys or too many");
  const int64_t sequence = task.batch * notes->num_heads + task.head;
  cpu::notes::Key keys[cpu::kBwdBlockN];
  cpu::notes::KeyCursor cursor(&task.keys, 1, cpu::notes::mask_of(params, task.batch));
  const int64_t count = cursor.next(keys, cpu::kBwdBlockN);
  for (int64_t i = 0; i < task.num_visits; ++i) {
    const cpu::Visit& reading = task.visits[i];
    int* progress = shared.progress + sequence * shared.tiles_per_head + reading.first_tile;
    for (int64_t begin = reading.queries.begin; begin < reading.queries.end; begin += cpu::kBwdBlockM, ++progress) {
      const ma::Range rows{begin, std::min(begin + cpu::kBwdBlockM, reading.queries.end)};
      visit(sequence, rows, keys, count);
      expect(*progress == reading.rank, "a task waits for a turn to add to dq that never comes");
      *progress = reading.rank + 1;
      if (reading.is_last) notes->stored.add(sequence, rows);
    }
  }
  notes->stored_keys.add(sequence, task.keys);
}

void rope(const ma::RopeParams&, int64_t, ma::Range) {}

// Only rows of large scores are measured.
void measure(const ma::AttentionParams&, const cpu::FwdTask&, void*, void*, void*) {}

const cpu::AttentionKernels kNotes{8, 8, fwd, measure, delta, bwd, rope};

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

  Notes fwd_notes{{}, {}, {}, problem.num_heads};
  notes = &fwd_notes;
  ma::FwdParams fwd_params{static_cast<const ma::AttentionParams&>(params)};
  fwd_params.num_threads = static_cast<int>(problem.choose(5, {1, 64}));  // by which tasks are cut
  fwd_params.parallel_for = [](int num_workers, void (*task)(int, void*), void* context) {
    for (int worker = 0; worker < num_workers; ++worker) task(worker, context);
  };
  cpu::run_fwd(fwd_params);
  fwd_notes.visits.expect_equal(listed, "forward on the CPU");
  fwd_notes.stored.expect_all(problem.num_sequences(), problem.seqlen_q(), "output on the CPU");

  Notes bwd_notes{{}, {}, {}, problem.num_heads};
  notes = &bwd_notes;
  std::vector<double> dq(problem.num_sequences() * problem.seqlen_q(), 1);
  const std::vector<double> lse(dq.size(), 0);  // no row is measured anew
  params.lse = lse.data();
  params.dq = dq.data();
  params.dq_strides = {params.num_heads * params.seqlen_q, 1, params.seqlen_q};
  cpu::run_bwd(params);
  // Rows that no task visits are set to zero by the caller.
  for (int64_t i = 0; i < static_cast<int64_t>(dq.size()); ++i) {
    const int64_t row = i % problem.seqlen_q();
    if (dq[i] == 0) bwd_notes.stored.add(i / problem.seqlen_q(), {row, row + 1});
  }
  bwd_notes.visits.expect_equal(listed, "backward on the CPU");
  bwd_notes.stored.expect_all(problem.num_sequences(), problem.seqlen_q(), "dq on the CPU");
  bwd_notes.stored_keys.expect_all(problem.num_sequences(), problem.seqlen_k, "dk and dv on the CPU");
}

}  // namespace walks

namespace mixed_attention::cpu {

const InstructionSet& selected_instruction_set() {
  static const InstructionSet notes{
      "notes", [] { return true; }, {walks::kNotes, walks::kNotes, walks::kNotes, walks::kNotes}};
  return notes;
}

}  // namespace mixed_attention::cpu
