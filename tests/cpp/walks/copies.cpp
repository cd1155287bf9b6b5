// The producers of Hopper's kernels as they stand, for all widths of queries and keys and of values. A barrier that
// expects other bytes than come never completes, a copy from behind the columns of a tensor may fault, and what is
// neither copied nor set to zero is whatever was there before.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/hopper/bwd/key_producer.cuh"
#include "cuda/hopper/bwd/list.h"
#include "cuda/hopper/bwd/listed_producer.cuh"
#include "cuda/hopper/bwd/query_producer.cuh"
#include "cuda/hopper/bwd/wide_dk_dv_config.h"
#include "cuda/hopper/bwd_fp32/config.h"
#include "cuda/hopper/fwd/producer.cuh"
#include "cuda/hopper/plan/tile_list.h"
#include "hopper.h"
#include "params.h"
#include "problem.h"

namespace walks {
namespace {

using hopper::DqForm;

constexpr unsigned char kStale = 0xEE;

struct Widths {
  int qk, v;
};

// One group that attends to itself, of so many rows that every buffer is used.
Problem one_group() {
  constexpr int64_t kRows = 2000;
  return {.segments = {{kRows, {{0, kRows}}}},
          .seqlen_k = kRows,
          .batch_size = 1,
          .num_heads = 1,
          .num_multiprocessors = 1,
          .dice = {}};
}

// A block's shared memory, whose tiles hold what a kernel before has left.
template <class Storage, class... Tiles>
std::unique_ptr<Storage> stale_memory(Tiles Storage::*... tiles) {
  auto shared = std::make_unique<Storage>();
  (std::memset(shared.get()->*tiles, kStale, sizeof(shared.get()->*tiles)), ...);
  return shared;
}

template <class Config>
CUtensorMap map_of(int columns, int box_rows) {
  const host_cuda::Box box{columns, box_rows, Config::kSlabColumns};
  CUtensorMap map{};
  std::memcpy(map.bytes, &box, sizeof(box));
  return map;
}

// Whether all tiles, of so many rows, were copied where the tensor has columns, and are zeros elsewhere.
template <class Config, class Tiles>
void expect_filled(const Tiles& tiles, int rows, int columns) {
  const int slab_bytes = 2 * rows * Config::kSlabColumns, tile_bytes = 2 * rows * Config::kHeadDim;
  const auto* const bytes = reinterpret_cast<const unsigned char*>(tiles);
  for (int begin = 0; begin < static_cast<int>(sizeof(tiles)); begin += slab_bytes) {
    const int first_column = begin % tile_bytes / slab_bytes * Config::kSlabColumns;
    const unsigned char expected = first_column < columns ? host_cuda::kCopied : 0;
    expect(std::all_of(bytes + begin, bytes + begin + slab_bytes, [&](unsigned char byte) { return byte == expected; }),
           expected == 0 ? "columns that no tensor has are not zeros" : "columns of a tensor are not copied");
  }
}

void expect_complete(uint64_t missing_bytes) {
  expect(missing_bytes == 0, "a barrier expects more bytes than copies bring");
}

template <size_t kStages>
void expect_complete(const uint64_t (&missing_bytes)[kStages]) {
  for (const uint64_t missing : missing_bytes) expect_complete(missing);
}

template <class Config>
void check_fwd(const Problem& problem, const ma::Schedule& schedule, Widths widths) {
  ma::FwdParams call{};
  fill(call, problem, schedule, ma::DType::kBFloat16, Config::kHeadDim, false);
  hopper::FwdKernelParams params{};
  params.q = map_of<Config>(widths.qk, Config::kBlockM);
  params.k = map_of<Config>(widths.qk, Config::kBlockN);
  params.v = map_of<Config>(widths.v, Config::kBlockN);
  params.head_dim = widths.qk;
  params.head_dim_v = widths.v;
  const hopper::HostTileList list = hopper::make_tile_list(call, Config::kBlockM, Config::kBlockN);
  params.table = Config::kIsListed ? list.table(call) : hopper::make_work_table(call, Config::kBlockM, Config::kBlockN);
  params.table.list.tiles = list.tiles.data();
  params.table.list.ranges = list.ranges.data();

  using Storage = hopper::FwdSharedStorage<Config>;
  const auto shared = stale_memory(&Storage::q, &Storage::k, &Storage::v);
  hopper::clear_missing_slabs<Config>(params, *shared);
  hopper::Loaded<Config> loaded;
  hopper::produce<Config>(params, *shared, loaded, 0);
  expect_complete(shared->q_pipe.full);
  expect_complete(shared->k_pipe.full);
  expect_complete(shared->v_pipe.full);
  expect_filled<Config>(shared->q, Config::kBlockM, widths.qk);
  expect_filled<Config>(shared->k, Config::kBlockN, widths.qk);
  expect_filled<Config>(shared->v, Config::kBlockN, widths.v);
}

// What the kernels of the backward have alike. Pipes: whose barriers expect copies.
template <class Config, class Storage, class Params, class Produce, class... Pipes>
void check_bwd(Params& params, Widths widths, const Produce& produce, Pipes Storage::*... pipes) {
  params.q = map_of<Config>(widths.qk, Config::kBlockM);
  params.dout = map_of<Config>(widths.v, Config::kBlockM);
  params.k = map_of<Config>(widths.qk, Config::kBlockN);
  params.v = map_of<Config>(widths.v, Config::kBlockN);
  params.head_dim = widths.qk;
  params.head_dim_v = widths.v;
  const auto shared = stale_memory(&Storage::q, &Storage::dout, &Storage::k, &Storage::v);
  hopper::clear_missing_input_slabs<Config>(params, *shared);
  produce(*shared);
  (expect_complete((shared.get()->*pipes).full), ...);
  expect_filled<Config>(shared->q, Config::kBlockM, widths.qk);
  expect_filled<Config>(shared->dout, Config::kBlockM, widths.v);
  expect_filled<Config>(shared->k, Config::kBlockN, widths.qk);
  expect_filled<Config>(shared->v, Config::kBlockN, widths.v);
}

ma::BwdParams bwd_call(const Problem& problem, const ma::Schedule& schedule, int head_dim) {
  ma::BwdParams call{};
  fill(call, problem, schedule, ma::DType::kBFloat16, head_dim, false);
  return call;
}

template <class Config, class Storage, class Params>
void check_dk_dv(const Problem& problem, const ma::Schedule& schedule, Widths widths) {
  const ma::BwdParams call = bwd_call(problem, schedule, Config::kHeadDim);
  Params params{};
  params.table = hopper::make_key_work_table(call, hopper::make_query_runs(schedule), Config::kBlockN);
  check_bwd<Config, Storage>(
      params, widths, [&](Storage& shared) { hopper::produce_queries<Config>(params, shared); }, &Storage::kv_pipe,
      &Storage::q_pipe, &Storage::dout_pipe);
}

template <class Config, class Storage, class Params>
void check_dq(const Problem& problem, const ma::Schedule& schedule, Widths widths) {
  const ma::BwdParams call = bwd_call(problem, schedule, Config::kHeadDim);
  Params params{};
  params.table = {hopper::make_work_table(call, Config::kBlockM, Config::kBlockN)};
  check_bwd<Config, Storage>(
      params, widths, [&](Storage& shared) { hopper::produce_keys<Config>(params, shared); }, &Storage::q_pipe,
      &Storage::k_pipe, &Storage::v_pipe);
}

// A block that takes up a single tile of keys, in every buffer for these.
template <class Config>
void check_listed_dk_dv(const Problem& problem, const ma::Schedule& schedule, Widths widths) {
  const ma::BwdParams call = bwd_call(problem, schedule, Config::kHeadDim);
  const DqForm form = Config::kAddsDq ? DqForm::kAtomic : DqForm::kSeparate;
  const hopper::BwdList list = hopper::make_bwd_list(call, hopper::make_query_runs(schedule), form, 1);
  hopper::ListedDkDvKernelParams params{};
  params.table = list.key_list(call, list.bytes.data(), nullptr);
  using Storage = hopper::DkDvSharedStorage<Config>;
  check_bwd<Config, Storage>(
      params, widths,
      [&](Storage& shared) {
        const hopper::ListedKeys& keys = params.table.keys[0];
        hopper::ListedItem* const items = shared.items.items;
        for (int i = 0; i < Config::kKeyBuffers; ++i) {
          items[i] = {keys.row_begin, keys.row_end, 0, 0, keys.num_tiles, keys.first_run, 0};
        }
        items[Config::kKeyBuffers].num_tiles = -1;
        hopper::produce_listed_keys<Config>(params, shared);
        hopper::produce_listed_queries<Config>(params, shared);
      },
      &Storage::kv_pipe, &Storage::q_pipe, &Storage::dout_pipe);
}

// Calls check(widths) with a kernel's own width beside every narrower one, and with the next narrower one beside all.
template <class Check>
void for_each_widths(int head_dim, const Check& check) {
  for (const int wide : {head_dim, head_dim - 8}) {
    for (int narrow = 8; narrow <= head_dim; narrow += 8) {
      check(Widths{wide, narrow});
      check(Widths{narrow, wide});
    }
  }
}

template <int kHeadDim>
void check_16_bit(const Problem& problem, const ma::Schedule& schedule) {
  using Element = __half;
  for_each_widths(kHeadDim, [&](Widths widths) {
    check_fwd<hopper::FwdConfig<Element, kHeadDim, 1, hopper::FwdForm::kPlain>>(problem, schedule, widths);
    using Dq = hopper::DqConfig<Element, kHeadDim, false>;
    check_dq<Dq, hopper::DqSharedStorage<Dq>, hopper::DqKernelParams>(problem, schedule, widths);
    if constexpr (hopper::is_wide(kHeadDim)) {
      using Wide = hopper::WideDkDvConfig<Element, kHeadDim, false>;
      check_dk_dv<Wide, hopper::WideDkDvSharedStorage<Wide>, hopper::DkDvKernelParams>(problem, schedule, widths);
    } else {
      using Separate = hopper::DkDvConfig<Element, kHeadDim, false, DqForm::kSeparate>;
      check_dk_dv<Separate, hopper::DkDvSharedStorage<Separate>, hopper::DkDvKernelParams>(problem, schedule, widths);
    }
    if constexpr (hopper::can_add_dq(kHeadDim)) {
      using Atomic = hopper::DkDvConfig<Element, kHeadDim, false, DqForm::kAtomic>;
      check_dk_dv<Atomic, hopper::DkDvSharedStorage<Atomic>, hopper::DkDvKernelParams>(problem, schedule, widths);
    }
    if constexpr (hopper::has_list(kHeadDim)) {
      check_fwd<hopper::FwdConfig<Element, kHeadDim, 1, hopper::FwdForm::kListed>>(problem, schedule, widths);
      constexpr DqForm kForm = hopper::can_add_dq(kHeadDim) ? DqForm::kAtomic : DqForm::kSeparate;
      check_listed_dk_dv<hopper::DkDvConfig<Element, kHeadDim, false, kForm, 1, true>>(problem, schedule, widths);
    }
  });
}

template <int kLimbs>
void check_fp32(const Problem& problem, const ma::Schedule& schedule) {
  for_each_widths(64, [&](Widths widths) {
    check_fwd<hopper::FwdConfig<float, 64, kLimbs, hopper::FwdForm::kPlain>>(problem, schedule, widths);
    using Dq = hopper::Fp32DqConfig<kLimbs>;
    check_dq<Dq, hopper::Fp32DqSharedStorage<Dq>, hopper::Fp32DqKernelParams>(problem, schedule, widths);
    using DkDv = hopper::Fp32DkDvConfig<kLimbs>;
    check_dk_dv<DkDv, hopper::Fp32DkDvSharedStorage<DkDv>, hopper::Fp32DkDvKernelParams>(problem, schedule, widths);
  });
  for_each_widths(128, [&](Widths widths) {
    check_fwd<hopper::FwdConfig<float, 128, kLimbs, hopper::FwdForm::kPlain>>(problem, schedule, widths);
  });
}

}  // namespace

void check_copies() {
  const Problem problem = one_group();
  const ma::Schedule schedule = schedule_of(problem);
  gridDim.x = 1;
  blockIdx.x = 0;
  check_16_bit<32>(problem, schedule);
  check_16_bit<64>(problem, schedule);
  check_16_bit<96>(problem, schedule);
  check_16_bit<128>(problem, schedule);
  check_16_bit<192>(problem, schedule);
  check_16_bit<256>(problem, schedule);
  check_fp32<1>(problem, schedule);
  check_fp32<2>(problem, schedule);
}

}  // namespace walks
