#!/usr/bin/env bash
# Runs the small GPU tests under compute-sanitizer: tools/sanitize_gpu.sh PYTHON [TOOL...]
set -euo pipefail
python=$1
shift
if [ $# -eq 0 ]; then set -- memcheck racecheck synccheck initcheck; fi
# Every tensor gets an allocation of its own: inside a block of torch's cache, an access beyond a tensor goes unnoticed.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "$@"; do
  options=(--tool "$tool" --error-exitcode 1 --print-limit 20)
  # initcheck has to see who else wrote to memory; the others look at our kernels alone, which is far quicker.
  if [ "$tool" != initcheck ]; then options+=(--kernel-name kernel_substring=mixed_attention); fi
  # memcheck alone is quick enough for all; the others make a kernel ten to fifty times slower.
  if [ "$tool" = memcheck ]; then tests=sanitizer; else tests=every_kind; fi
  echo "compute-sanitizer ${options[*]}, tests marked $tests"
  compute-sanitizer "${options[@]}" "$python" -m pytest -q -x -m "$tests" -p no:cacheprovider
done
