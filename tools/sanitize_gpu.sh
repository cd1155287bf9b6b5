#!/usr/bin/env bash
# Runs the small GPU tests under compute-sanitizer: tools/sanitize_gpu.sh PYTHON [TOOL...]
set -euo pipefail
python=$1
shift
if [ $# -eq 0 ]; then set -- memcheck racecheck synccheck initcheck; fi
# Every tensor gets an allocation of its own: inside a block of torch's cache, an access beyond a tensor goes unnoticed.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "$@"; do
  # memcheck alone is quick enough for all; the others make a kernel ten to fifty times slower.
  if [ "$tool" = memcheck ]; then tests=sanitizer; else tests=every_kind; fi
  pytest=("$python" -m pytest -q -x -m "$tests" -p no:cacheprovider)
  # racecheck does not see that a consumer's arrival at a buffer's barrier comes before the producer's wait for it, by
  # which the Hopper kernels fill their buffers again; `python -m bench --what repeats` stands in for it there.
  if [ "$tool" = racecheck ]; then kernels=portable; else kernels=mixed_attention; fi
  echo "compute-sanitizer --tool $tool, tests marked $tests"
  if [ "$tool" = initcheck ]; then
    # It has to see who else wrote to memory. Of what it finds, ours alone counts: the kernels that ours are compared
    # with read memory that nobody wrote.
    log=$(mktemp)
    compute-sanitizer --tool initcheck --print-limit 0 "${pytest[@]}" >"$log" || { tail -n 30 "$log"; exit 1; }
    grep -a "passed" "$log"
    if grep -a -A 2 "at .*mixed_attention::" "$log"; then exit 1; fi
  else  # they look at our kernels alone, which is far quicker
    compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
      --kernel-name "kernel_substring=$kernels" "${pytest[@]}"
  fi
done
