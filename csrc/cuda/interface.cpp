#include "cuda/interface.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string_view>
#include <type_traits>
#include <utility>

#include "cuda/launch.h"
#include "schedule.h"

namespace mixed_attention::cuda {
namespace {

template <class... Structs>
constexpr bool are_plain = (std::is_trivially_copyable_v<Structs> && ...);
static_assert(are_plain<FwdParams, BwdParams, JvpParams, BwdJvpParams, RopeParams, RmsRopeParams, RopeJvpParams,
                        RopeBwdParams, CastParams, ColumnSumsParams, Problem, Layout, Served, Message>,
              "structs cross the interface as bytes");

void write(std::string_view text, Message* message) {
  *std::copy_n(text.begin(), std::min(text.size(), sizeof message->text - 1), message->text) = '\0';
}

// Calls function(). What it throws becomes a status and a message.
template <class Function>
Status call(Message* why, Function&& function) noexcept {
  try {
    function();
    return Status::kOk;
  } catch (const std::invalid_argument& error) {
    write(error.what(), why);
    return Status::kInvalidArgument;
  } catch (const std::exception& error) {
    write(error.what(), why);
    return Status::kFailed;
  }
}

const char* name_of(Choice::Family family) {
  switch (family) {
    case Choice::Family::kPortable: return "portable";
    case Choice::Family::kHopper: return "hopper";
    default: return "none";
  }
}

void write(const Choice& choice, Message* family, Message* why) {
  write(name_of(choice.family), family);
  write(choice.why, why);
}

// A pass by the functions that do its work.
template <class Params, auto choose, auto plan>
constexpr Pass<Params> pass_of() {
  return {
      .choose = [](const Problem* problem, Message* family,
                   Message* why) { return call(why, [&] { write(choose(*problem), family, why); }); },
      .plan =
          [](const Params* params, Served* served, Message* family, Message* why) {
            return call(why, [&] {
              Launch<Params> launch = plan(*params);
              write(launch.choice, family, why);
              *served = {nullptr, launch.layout, launch.workspace_size, launch.can_overwrite_inputs};
              if (launch.run) served->launch = new Launch<Params>(std::move(launch));
            });
          },
      .run = [](const void* launch, const Params* params,
                Message* why) { return call(why, [&] { static_cast<const Launch<Params>*>(launch)->run(*params); }); },
      .free = [](void* launch) { delete static_cast<Launch<Params>*>(launch); },
  };
}

constexpr Interface kInterface{
    .id = kInterfaceId,
    .make_schedule =
        [](const int64_t* flat, size_t length, int64_t seqlen_q, int64_t seqlen_k, Schedule** made, Message* why) {
          return call(why, [&] { *made = new Schedule(parse_schedule(flat, length, seqlen_q, seqlen_k)); });
        },
    .add_inverse = [](Schedule* schedule,
                      Message* why) { return call(why, [&] { mixed_attention::add_inverse(*schedule); }); },
    .free_schedule = [](Schedule* schedule) { delete schedule; },
    .fwd = pass_of<FwdParams, choose_fwd, plan_fwd>(),
    .bwd = pass_of<BwdParams, choose_bwd, plan_bwd>(),
    .jvp = pass_of<JvpParams, choose_jvp, plan_jvp>(),
    .bwd_jvp = pass_of<BwdJvpParams, choose_bwd_jvp, plan_bwd_jvp>(),
    .run_rope = [](const RopeParams* params,
                   Message* why) { return call(why, [&] { mixed_attention::cuda::run_rope(*params); }); },
    .run_rms_rope = [](const RmsRopeParams* params,
                       Message* why) { return call(why, [&] { mixed_attention::cuda::run_rms_rope(*params); }); },
    .run_rope_jvp = [](const RopeJvpParams* params,
                       Message* why) { return call(why, [&] { mixed_attention::cuda::run_rope_jvp(*params); }); },
    .run_rope_backward =
        [](const RopeBwdParams* params, Message* why) {
          return call(why, [&] { mixed_attention::cuda::run_rope_backward(*params); });
        },
    .run_cast = [](const CastParams* params,
                   Message* why) { return call(why, [&] { mixed_attention::cuda::run_cast(*params); }); },
    .run_column_sums = [](const ColumnSumsParams* params,
                          Message* why) { return call(why, [&] { mixed_attention::cuda::run_column_sums(*params); }); },
};

}  // namespace
}  // namespace mixed_attention::cuda

const mixed_attention::cuda::Interface* mixed_attention_kernels() { return &mixed_attention::cuda::kInterface; }
