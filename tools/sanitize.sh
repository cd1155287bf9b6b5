#!/usr/bin/env bash
# Runs the tests of the operator and the layers on a package built with sanitizers: tools/sanitize.sh PACKAGE_DIR PYTHON
set -euo pipefail
package=$(realpath "$1")
python=$(realpath --no-symlinks "$2")
# Python itself is not instrumented, so the sanitizer's runtime is loaded before it; and as it frees little at exit,
# leaks cannot be told apart.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$package"
# `python -m pytest` would put the current folder, and with it the package that is built for use, before that path.
exec "$python" "$(dirname "$python")/pytest" -q -p no:cacheprovider -o pythonpath= \
  tests/test_ops.py tests/test_edges.py tests/test_dropout.py tests/test_threads.py tests/test_random.py tests/test_cache.py
