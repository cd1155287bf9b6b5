// torch_internals.h for tests/tools/test_torch_internals.py: whether this release of torch answers what it is asked.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace mixed_attention {

// Names it as the module's torch_internals.
void define_tested_internals(pybind11::module_& m);

}  // namespace mixed_attention
