// Segments of a plan as the kernels walk them: by query for the forward and dq, by key for dk and dv.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mixed_attention {

// Half-open row range [begin, end).
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Query rows and the keys that they attend to. A range that stands twice counts twice.
struct QuerySegment {
  Range rows;
  std::vector<Range> keys;
};

// One reading of a key segment: the query rows that attend to it, and where it lies in their list of ranges.
struct Reader {
  Range queries;
  int range_index;       // which range of the query segment's list
  int64_t range_offset;  // where in that range the key segment begins
};

// A maximal run of key rows with the same readers; without readers its gradients are zero.
struct KeySegment {
  Range rows;
  std::vector<Reader> readers;  // in order of query rows
};

struct Schedule {
  int64_t seqlen_q, seqlen_k;
  std::vector<QuerySegment> query_segments;  // without empty ones; in order, they cover all rows once
  std::vector<KeySegment> key_segments;      // without empty ones; in order, they cover all rows once
  int64_t num_pairs;                         // attended (query, key) pairs
  uint64_t id = 0;  // no other schedule of this process has it: what is derived from one is found again by it
};

// Parses a flat plan, per segment: begin, end, number of ranges, then begin and end of every key range. The result has
// no key segments yet.
// Throws std::invalid_argument where it is malformed, does not cover the queries once and in order, or leaves a tensor.
Schedule parse_schedule(const int64_t* flat, size_t length, int64_t seqlen_q, int64_t seqlen_k);

// Makes the key segments, which backward passes alone read.
void add_inverse(Schedule& schedule);

// Both.
Schedule make_schedule(const int64_t* flat, size_t length, int64_t seqlen_q, int64_t seqlen_k);

}  // namespace mixed_attention
