#!/usr/bin/env bash
# Runs the small GPU tests under compute-sanitizer: tools/sanitize_gpu.sh PYTHON [TOOL...]
set -euo pipefail
python=$1
shift
if [ $# -eq 0 ]; then set -- memcheck racecheck synccheck initcheck; fi
# Every tensor gets an allocation of its own: inside a block of torch's cache, an access beyond a tensor goes unnoticed.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "$@"; do
  pytest=("$python" -m pytest -q -x -p no:cacheprovider)
  # memcheck alone is quick enough for all; the others make a kernel ten to fifty times slower.
  if [ "$tool" = memcheck ]; then pytest+=(-m sanitizer); else pytest+=(-m every_kind); fi
  # racecheck does not see that a consumer's arrival at a buffer's barrier comes before the producer's wait for it, by
  # which the Hopper kernels fill their buffers again; `python -m bench --what repeats` stands in for it there.
  if [ "$tool" = racecheck ]; then families=portable; else families=; fi
  echo "compute-sanitizer --tool $tool: ${pytest[*]}"
  if [ "$tool" = initcheck ]; then
    # It has to see who else wrote to memory, but does not see what TMA writes: to print all that reads what
    # cuDNN wrote takes minutes, so that torch's attention is another here. What is found counts where it is ours alone.
    log=$(mktemp)
    TORCH_CUDNN_SDPA_DEPRIORITIZED=1 compute-sanitizer --tool initcheck --print-limit 0 "${pytest[@]}" >"$log" ||
      { tail -n 30 "$log"; exit 1; }
    grep -a "passed" "$log"
    if grep -a -A 2 "at .*mixed_attention::" "$log"; then exit 1; fi
  else  # they look at our kernels alone, which is far quicker
    MIXED_ATTENTION_GPU=$families compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
      --kernel-name "kernel_substring=mixed_attention" "${pytest[@]}"
  fi
done
