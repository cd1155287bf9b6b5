#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

namespace mixed_attention {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument("plan: " + message); }

std::string to_string(Range range) {
  std::string text = "[";
  return text.append(std::to_string(range.begin)).append(", ").append(std::to_string(range.end)).append(")");
}

std::vector<QuerySegment> parse(const int64_t* flat, size_t length, int64_t seqlen_q, int64_t seqlen_k) {
  std::vector<QuerySegment> segments;
  int64_t covered = 0;
  for (size_t at = 0; at < length;) {
    if (length - at < 3) fail("ends inside a segment");
    const Range rows{flat[at], flat[at + 1]};
    const int64_t num_ranges = flat[at + 2];
    at += 3;
    if (rows.begin != covered || rows.end < rows.begin) {
      fail("query segment " + to_string(rows) + " does not begin at row " + std::to_string(covered) +
           "; segments must cover the queries once and in order");
    }
    covered = rows.end;
    if (num_ranges < 0 || static_cast<uint64_t>(num_ranges) > (length - at) / 2) fail("ends inside a segment");
    QuerySegment segment{rows, {}};
    for (int64_t i = 0; i < num_ranges; ++i, at += 2) {
      const Range keys{flat[at], flat[at + 1]};
      if (keys.begin < 0 || keys.end < keys.begin || keys.end > seqlen_k) {
        fail("key range " + to_string(keys) + " is not within the " + std::to_string(seqlen_k) + " rows of k");
      }
      segment.keys.push_back(keys);  // empty ranges stay: dropout counts ranges
    }
    if (rows.size() > 0) segments.push_back(std::move(segment));
  }
  if (covered != seqlen_q) {
    fail("covers " + std::to_string(covered) + " queries, q has " + std::to_string(seqlen_q) +
         "; build the plan from the same token_specs");
  }
  return segments;
}

// Cuts the keys wherever some range begins or ends; between two cuts everybody reads all keys or none.
std::vector<KeySegment> invert(const std::vector<QuerySegment>& segments, int64_t seqlen_k) {
  std::vector<int64_t> cuts{0, seqlen_k};
  for (const QuerySegment& segment : segments) {
    for (const Range& keys : segment.keys) {
      if (keys.size() > 0) cuts.insert(cuts.end(), {keys.begin, keys.end});
    }
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());

  std::vector<KeySegment> inverse;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) inverse.push_back({{cuts[i], cuts[i + 1]}, {}});
  for (const QuerySegment& segment : segments) {
    for (size_t range_index = 0; range_index < segment.keys.size(); ++range_index) {
      const Range keys = segment.keys[range_index];
      const auto first = std::lower_bound(cuts.begin(), cuts.end(), keys.begin) - cuts.begin();
      for (size_t i = first; i < inverse.size() && inverse[i].rows.end <= keys.end; ++i) {
        inverse[i].readers.push_back({segment.rows, static_cast<int>(range_index), inverse[i].rows.begin - keys.begin});
      }
    }
  }
  return inverse;
}

}  // namespace

Schedule parse_schedule(const int64_t* flat, size_t length, int64_t seqlen_q, int64_t seqlen_k) {
  static std::atomic<uint64_t> last_id = 0;
  Schedule schedule{seqlen_q, seqlen_k, parse(flat, length, seqlen_q, seqlen_k), {}, 0, ++last_id};
  for (const QuerySegment& segment : schedule.query_segments) {
    for (const Range& keys : segment.keys) schedule.num_pairs += segment.rows.size() * keys.size();
  }
  return schedule;
}

void add_inverse(Schedule& schedule) { schedule.key_segments = invert(schedule.query_segments, schedule.seqlen_k); }

Schedule make_schedule(const int64_t* flat, size_t length, int64_t seqlen_q, int64_t seqlen_k) {
  Schedule schedule = parse_schedule(flat, length, seqlen_q, seqlen_k);
  add_inverse(schedule);
  return schedule;
}

}  // namespace mixed_attention
