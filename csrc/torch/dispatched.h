// The operators by way of torch's dispatcher, where profilers and modes see them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <type_traits>

namespace mixed_attention {

// name: what kOperator is registered as; it is looked up once.
template <auto kOperator>
const auto& dispatched(const char* name) {
  static const auto found =
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<std::remove_pointer_t<decltype(kOperator)>>();
  return found;
}

}  // namespace mixed_attention
