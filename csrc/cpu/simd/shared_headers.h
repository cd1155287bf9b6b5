// What stands above the target pragma of an instruction set: functions of these headers are shared with the rest of the
// program and must not use what an older machine lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
