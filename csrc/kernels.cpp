#include "kernels.h"

#include <dlfcn.h>

#include <stdexcept>
#include <type_traits>
#include <utility>

#include "cuda/interface.h"

namespace mixed_attention::kernels {
namespace {

using cuda::Interface;
using cuda::Message;
using cuda::Status;

const Interface*& kernels() {
  static const Interface* found = mixed_attention_kernels();
  return found;
}

std::string& reason() {
  // NOTE: never freed, as threads may outlive static objects.
  static auto* why = new std::string("built without CUDA kernels; rebuild with MIXED_ATTENTION_CUDA=1");
  return *why;
}

template <class Params>
const cuda::Pass<Params>& pass() {
  if constexpr (std::is_same_v<Params, FwdParams>) {
    return kernels()->fwd;
  } else if constexpr (std::is_same_v<Params, BwdParams>) {
    return kernels()->bwd;
  } else if constexpr (std::is_same_v<Params, JvpParams>) {
    return kernels()->jvp;
  } else {
    return kernels()->bwd_jvp;
  }
}

// Throws what a status stands for, unless all is well.
void check(Status status, const Message& why) {
  if (status == Status::kInvalidArgument) throw std::invalid_argument(why.text);
  if (status != Status::kOk) throw std::runtime_error(why.text);
}

// Calls a function of the interface.
template <class Params>
void call(Status (*function)(const Params*, Message*), const Params& params) {
  Message why;
  check(function(&params, &why), why);
}

}  // namespace

bool are_there() { return kernels() != nullptr; }

const std::string& why_none() { return reason(); }

void set_why_none(std::string why) { reason() = std::move(why); }

void open(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const std::string subject = "the library of mixed-attention-kernels ";
  if (library == nullptr) throw std::runtime_error(subject + "cannot be opened: " + dlerror());
  const auto get = reinterpret_cast<decltype(&mixed_attention_kernels)>(dlsym(library, "mixed_attention_kernels"));
  const Interface* found = get == nullptr ? nullptr : get();
  if (found == nullptr) throw std::runtime_error(subject + "has no kernels: " + path);
  if (found->id != cuda::kInterfaceId) {
    throw std::runtime_error(subject +
                             "has another interface than this package, both must come from one build: " + path);
  }
  kernels() = found;
}

std::shared_ptr<Schedule> make_schedule(const int64_t* flat, size_t length, int64_t seqlen_q, int64_t seqlen_k) {
  Message why;
  Schedule* made = nullptr;
  check(kernels()->make_schedule(flat, length, seqlen_q, seqlen_k, &made, &why), why);
  return {made, kernels()->free_schedule};
}

void add_inverse(Schedule& schedule) {
  Message why;
  check(kernels()->add_inverse(&schedule, &why), why);
}

template <class Params>
Choice choose(const cuda::Problem& problem) {
  Message family, why;
  check(pass<Params>().choose(&problem, &family, &why), why);
  return {family.text, why.text};
}

template <class Params>
Launch<Params> plan(const Params& params) {
  Message family, why;
  cuda::Served served;
  check(pass<Params>().plan(&params, &served, &family, &why), why);
  return {.choice = {family.text, why.text},
          .layout = served.layout,
          .workspace_size = served.workspace_size,
          .can_overwrite_inputs = served.can_overwrite_inputs,
          .launch = {served.launch, pass<Params>().free}};
}

template <class Params>
void Launch<Params>::run(const Params& params) const {
  Message why;
  check(pass<Params>().run(launch.get(), &params, &why), why);
}

template struct Launch<FwdParams>;
template struct Launch<BwdParams>;
template struct Launch<JvpParams>;
template struct Launch<BwdJvpParams>;
template Choice choose<FwdParams>(const cuda::Problem&);
template Choice choose<BwdParams>(const cuda::Problem&);
template Choice choose<JvpParams>(const cuda::Problem&);
template Choice choose<BwdJvpParams>(const cuda::Problem&);
template Launch<FwdParams> plan(const FwdParams&);
template Launch<BwdParams> plan(const BwdParams&);
template Launch<JvpParams> plan(const JvpParams&);
template Launch<BwdJvpParams> plan(const BwdJvpParams&);

void run_rope(const RopeParams& params) { call(kernels()->run_rope, params); }
void run_rms_rope(const RmsRopeParams& params) { call(kernels()->run_rms_rope, params); }
void run_rope_jvp(const RopeJvpParams& params) { call(kernels()->run_rope_jvp, params); }
void run_rope_backward(const RopeBwdParams& params) { call(kernels()->run_rope_backward, params); }
void run_cast(const cuda::CastParams& params) { call(kernels()->run_cast, params); }
void run_column_sums(const cuda::ColumnSumsParams& params) { call(kernels()->run_column_sums, params); }

}  // namespace mixed_attention::kernels
