// Arithmetic and head_dim at run time -> kernel.
#include "cuda/portable/launch.h"

#include <memory>
#include <utility>

#include "cuda/portable/bring.h"
#include "cuda/portable/config.h"
#include "cuda/portable/kernels.h"
#include "cuda/portable/plan.h"
#include "cuda/portable/tangent_kernels.h"
#include "cuda/portable/tangent_plan.h"

namespace mixed_attention::cuda::portable {
namespace {

// Calls function.operator()<arithmetic, head_dim>() with the values as template arguments.
template <Arithmetic kArithmetic, size_t... kIndices, class Function>
void with_head_dim(int head_dim, std::index_sequence<kIndices...>, Function&& function) {
  ((head_dim == kHeadDims[kIndices] && (function.template operator()<kArithmetic, kHeadDims[kIndices]>(), true)) ||
   ...);
}

template <class Function>
void with_kernel(Arithmetic arithmetic, int head_dim, Function&& function) {
  constexpr auto kAll = std::make_index_sequence<std::size(kHeadDims)>();
  switch (arithmetic) {
    case Arithmetic::kFloat16: return with_head_dim<Arithmetic::kFloat16>(head_dim, kAll, function);
    case Arithmetic::kBFloat16: return with_head_dim<Arithmetic::kBFloat16>(head_dim, kAll, function);
    case Arithmetic::kTf32: return with_head_dim<Arithmetic::kTf32>(head_dim, kAll, function);
    case Arithmetic::kTf32x3: return with_head_dim<Arithmetic::kTf32x3>(head_dim, kAll, function);
  }
}

// Which pairs instantiations.txt has kernels of tangents for.
template <Arithmetic kArithmetic, int kHeadDim>
constexpr bool kHasTangents = kArithmetic != Arithmetic::kTf32 && has_tangents(kArithmetic, kHeadDim);

}  // namespace

Launch<FwdParams> launch_of_fwd(const FwdParams& params) {
  auto plan = std::make_shared<FwdPasses>(plan_fwd(params));
  const Tile tile = fwd_tile(plan->arithmetic, plan->head_dim);
  return {.layout = plan->by_query.pass->layout(tile, params.batch_size * params.num_heads, params.device),
          .workspace_size = plan->workspace_size,
          .run = [plan](const FwdParams& params) {
            take_workspace(params, *plan);
            const Brought by_query = bring(plan->by_query, params);
            with_kernel(plan->arithmetic, plan->head_dim, [&]<Arithmetic kArithmetic, int kHeadDim>() {
              launch_fwd<kArithmetic, kHeadDim>(params, plan->buffers, by_query.work);
            });
          }};
}

Launch<BwdParams> launch_of_bwd(const BwdParams& params) {
  auto plan = std::make_shared<BwdPasses>(plan_bwd(params));
  const Tile tile = dk_dv_tile(plan->arithmetic, plan->head_dim);
  return {.layout = plan->by_key.pass->layout(tile, params.batch_size * params.num_heads, params.device),
          .workspace_size = plan->workspace_size,
          .run = [plan](const BwdParams& params) {
            take_workspace(params, *plan);
            with_kernel(plan->arithmetic, plan->head_dim, [&]<Arithmetic kArithmetic, int kHeadDim>() {
              const Brought by_key = bring(plan->by_key, params);
              launch_bwd_by_key<kArithmetic, kHeadDim>(params, plan->buffers, by_key.work);
              if (plan->adds_dq) return;
              const Brought by_query = bring(plan->by_query, params);
              launch_bwd_by_query<kArithmetic, kHeadDim>(params, plan->buffers, by_query.work);
            });
          }};
}

Launch<JvpParams> launch_of_jvp(const JvpParams& params) {
  auto plan = std::make_shared<JvpPlan>(plan_jvp(params));
  return {.layout = plan->by_query.pass->layout(plan->tile, params.batch_size * params.num_heads, params.device),
          .workspace_size = plan->workspace_size,
          .run = [plan](const JvpParams& params) {
            take_workspace(params, *plan);
            const Brought by_query = bring(plan->by_query, params);
            with_kernel(plan->arithmetic, plan->head_dim, [&]<Arithmetic kArithmetic, int kHeadDim>() {
              if constexpr (kHasTangents<kArithmetic, kHeadDim>) {
                launch_jvp<kArithmetic, kHeadDim>(params, by_query.work);
              }
            });
          }};
}

Launch<BwdJvpParams> launch_of_bwd_jvp(const BwdJvpParams& params) { return launch_of_bwd_jvp(params, {}); }

Launch<BwdJvpParams> launch_of_bwd_jvp(const BwdJvpParams& params, BwdJvpProducts products) {
  auto plan = std::make_shared<BwdJvpPlan>(plan_bwd_jvp(params));
  const Tile tile = bwd_jvp_tile(plan->arithmetic, plan->head_dim);
  return {.layout = plan->by_key.pass->layout(tile, params.batch_size * params.num_heads, params.device),
          .workspace_size = plan->workspace_size + products.workspace_size,
          .run = [plan, products = std::move(products.run)](const BwdJvpParams& params) {
            take_workspace(params, *plan);
            const BwdJvpBuffers& buffers = plan->buffers;
            with_kernel(plan->arithmetic, plan->head_dim, [&]<Arithmetic kArithmetic, int kHeadDim>() {
              if constexpr (kHasTangents<kArithmetic, kHeadDim>) {
                const Brought by_key = bring(plan->by_key, params);
                launch_bwd_jvp_rows<kArithmetic, kHeadDim>(params, buffers, by_key.work);
                if (products != nullptr) {
                  const BwdJvpRows rows{buffers.bwd.lse_log2,
                                        static_cast<const float*>(params.lse_dot),
                                        buffers.eps,
                                        buffers.bwd.delta,
                                        buffers.bwd.references,
                                        buffers.bwd.has_references};
                  return products(params, rows, static_cast<char*>(params.workspace) + plan->workspace_size);
                }
                launch_bwd_jvp_by_key<kArithmetic, kHeadDim>(params, buffers, by_key.work);
                const Brought by_query = bring(plan->by_query, params);
                launch_bwd_jvp_by_query<kArithmetic, kHeadDim>(params, buffers, by_query.work);
              }
            });
          }};
}

}  // namespace mixed_attention::cuda::portable
