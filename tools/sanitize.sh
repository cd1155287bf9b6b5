#!/usr/bin/env bash
# Runs the tests on a package built with sanitizers: tools/sanitize.sh PACKAGE_DIR PYTHON
set -euo pipefail
package=$(realpath "$1")
python=$(realpath --no-symlinks "$2")
# Python itself is not instrumented, so the sanitizer's runtime is loaded before it; and as it frees little at exit,
# leaks cannot be told apart.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$package:$PWD"  # bench lies here, and so would the package that is built for use
# `python -m pytest` would put the current folder before that path.
run_tests() {
  "$python" "$(dirname "$python")/pytest" -q -p no:cacheprovider -o pythonpath= "$@"
}
# The example and the packaging start programs of their own.
run_tests tests --ignore=tests/docs/test_example_airfoil.py --ignore=tests/docs/test_readme.py \
  --ignore=tests/tools/test_packaging.py
# The other instruction sets that this machine offers.
instruction_set() { "$python" -c "import mixed_attention as ma; print(ma.ops.cpu_instruction_set())" 2>/dev/null; }
chosen=$(instruction_set)
for wanted in AMX AVX512_BF16 AVX512 AVX2 portable; do
  [ "$wanted" != "$chosen" ] || continue
  export MIXED_ATTENTION_CPU=$wanted
  instruction_set >/dev/null || { echo "NOTE: this machine has no $wanted" >&2; continue; }
  run_tests tests/operator/test_edges.py tests/operator/test_random.py tests/operator/test_rope.py
done
