// The kernels without torch: forward and backward of a small plan against plain double loops, on real threads.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cpu/launch.h"
#include "schedule.h"

namespace ma = mixed_attention;

namespace {

constexpr int64_t kTokens = 300, kHeads = 2, kDim = 24;
constexpr int64_t kSize = kTokens * kHeads * kDim;
constexpr double kScale = 0.2;

// Rows 0..199 read keys 0..99 and 250..299; rows 200..299 read keys 120..239; keys 100..119 and 240..249 nobody reads.
const std::vector<int64_t> kPlan{0, 200, 2, 0, 100, 250, 300, 200, 300, 1, 120, 240};

void run_threads(int num_workers, void (*task)(int worker, void* context), void* context) {
  std::vector<std::thread> threads;
  for (int worker = 0; worker < num_workers; ++worker) threads.emplace_back(task, worker, context);
  for (std::thread& thread : threads) thread.join();
}

struct Problem {
  std::vector<double> q, k, v, dout, out, lse, dq, dk, dv;
};

// Row of (tokens, heads, dim), and element of (heads, tokens).
int64_t row(int64_t token, int64_t head) { return (token * kHeads + head) * kDim; }

double dot(const double* a, const double* b) {
  double sum = 0;
  for (int64_t d = 0; d < kDim; ++d) sum += a[d] * b[d];
  return sum;
}

template <class Visit>
void for_each_key(const ma::QuerySegment& segment, Visit visit) {
  for (const ma::Range& keys : segment.keys) {
    for (int64_t j = keys.begin; j < keys.end; ++j) visit(j);
  }
}

void solve_by_loops(const ma::Schedule& schedule, Problem& x) {
  for (const ma::QuerySegment& segment : schedule.query_segments) {
    for (int64_t i = segment.rows.begin; i < segment.rows.end; ++i) {
      for (int64_t h = 0; h < kHeads; ++h) {
        double* out = &x.out[row(i, h)];
        double sum = 0;
        const auto score = [&](int64_t j) { return kScale * dot(&x.q[row(i, h)], &x.k[row(j, h)]); };
        for_each_key(segment, [&](int64_t j) { sum += std::exp(score(j)); });
        const double lse = x.lse[h * kTokens + i] = std::log(sum);
        for_each_key(segment, [&](int64_t j) {
          for (int64_t d = 0; d < kDim; ++d) out[d] += std::exp(score(j) - lse) * x.v[row(j, h) + d];
        });
        const double* dout = &x.dout[row(i, h)];
        const double delta = dot(out, dout);
        for_each_key(segment, [&](int64_t j) {
          const double p = std::exp(score(j) - lse), ds = p * (dot(dout, &x.v[row(j, h)]) - delta) * kScale;
          for (int64_t d = 0; d < kDim; ++d) {
            x.dv[row(j, h) + d] += p * dout[d];
            x.dk[row(j, h) + d] += ds * x.q[row(i, h) + d];
            x.dq[row(i, h) + d] += ds * x.k[row(j, h) + d];
          }
        });
      }
    }
  }
}

template <class T>
std::vector<T> cast(const std::vector<double>& values) {
  return std::vector<T>(values.begin(), values.end());
}

template <class T>
bool agrees(const char* name, const std::vector<T>& got, const std::vector<double>& expected, double tolerance) {
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(static_cast<double>(got[i]) - expected[i]);
    if (!(error <= worst)) worst = error;  // a NaN stays
  }
  const bool good = worst <= tolerance;
  std::printf("%s %-4s largest error %.2e, bound %.0e\n", good ? "ok  " : "FAIL", name, worst, tolerance);
  return good;
}

// Inputs are O(1) and every sum has at most 200 terms: rounding stays well below 1000 units in the last place.
template <class T>
bool solve_by_kernels(ma::DType dtype, const ma::Schedule& schedule, const Problem& x) {
  const auto q = cast<T>(x.q), k = cast<T>(x.k), v = cast<T>(x.v), dout = cast<T>(x.dout);
  const T poison = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> out(kSize, poison), lse(kTokens * kHeads, poison), dq = out, dk = out, dv = out;
  const ma::Strides strides{kSize, kHeads * kDim, kDim};

  ma::FwdParams fwd{};
  fwd.dtype = dtype;
  fwd.batch_size = 1;
  fwd.num_heads = kHeads;
  fwd.seqlen_q = fwd.seqlen_k = kTokens;
  fwd.head_dim = fwd.head_dim_v = kDim;
  fwd.q = q.data();
  fwd.k = k.data();
  fwd.v = v.data();
  fwd.q_strides = fwd.k_strides = fwd.v_strides = fwd.out_strides = strides;
  fwd.softmax_scale = kScale;
  fwd.schedule = &schedule;
  fwd.parallel_for = run_threads;
  fwd.num_threads = 3;
  fwd.out = out.data();
  fwd.lse = lse.data();
  ma::cpu::run_fwd(fwd);

  ma::BwdParams bwd{};
  static_cast<ma::AttentionParams&>(bwd) = fwd;
  bwd.out = out.data();
  bwd.lse = lse.data();
  bwd.dout = dout.data();
  bwd.dq = dq.data();
  bwd.dk = dk.data();
  bwd.dv = dv.data();
  bwd.out_strides = bwd.dout_strides = bwd.dq_strides = bwd.dk_strides = bwd.dv_strides = strides;
  ma::cpu::run_bwd(bwd, /*wide_keys=*/false);

  const double tolerance = 1000 * std::numeric_limits<T>::epsilon();
  bool good = agrees("out", out, x.out, tolerance);
  good = agrees("lse", lse, x.lse, tolerance) && good;
  good = agrees("dq", dq, x.dq, tolerance) && good;
  good = agrees("dk", dk, x.dk, tolerance) && good;
  return agrees("dv", dv, x.dv, tolerance) && good;
}

}  // namespace

int main() {
  const ma::Schedule schedule = ma::make_schedule(kPlan.data(), kPlan.size(), kTokens, kTokens);
  Problem x;
  std::mt19937_64 generator(7);
  std::normal_distribution<float> normal;  // of float, so that fp32 and fp64 see the same numbers
  for (std::vector<double>* input : {&x.q, &x.k, &x.v, &x.dout}) {
    for (int64_t i = 0; i < kSize; ++i) input->push_back(normal(generator));
  }
  for (std::vector<double>* result : {&x.out, &x.dq, &x.dk, &x.dv}) result->assign(kSize, 0.0);
  x.lse.assign(kTokens * kHeads, 0.0);
  solve_by_loops(schedule, x);

  std::printf("instruction set: %s\n", ma::cpu::instruction_set());
  const bool fp32 = solve_by_kernels<float>(ma::DType::kFloat32, schedule, x);
  const bool fp64 = solve_by_kernels<double>(ma::DType::kFloat64, schedule, x);
  return fp32 && fp64 ? 0 : 1;
}
