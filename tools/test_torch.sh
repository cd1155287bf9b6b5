#!/usr/bin/env bash
# Makes a fresh environment with one release of torch, builds the package there without CUDA kernels, and runs the tests.
#
# usage: test_torch.sh TORCH [PYTHON] [PYTEST ARGUMENTS...]
#   TORCH   a release, as 2.13.0
#   PYTHON  an interpreter, as python3.12; by default python3
#   What comes behind goes to pytest, as tests/operator tests/layer; by default it runs the whole suite.
#
# Everything lies in build/torch/TORCH-PYTHON, and is made anew. The tracked files are copied there, so that what this
# builds does not get in the way of the checkout's own build. The last line says what was run.
set -euo pipefail
torch=${1:?usage: test_torch.sh TORCH [PYTHON] [PYTEST ARGUMENTS...]}
python=$(command -v "${2:-python3}")
shift && [ $# = 0 ] || shift
root=$(cd "$(dirname "$0")/.." && pwd)
version=$("$python" -c 'import platform; print(platform.python_version())')
folder=$root/build/torch/$torch-$version
rm -rf "$folder" && mkdir -p "$folder/source"

"$python" -m venv "$folder/environment"
bin=$folder/environment/bin
# Not by requirements.txt, whose releases fit one torch and one Python: whatever a user gets there.
"$bin/pip" install --quiet "torch==$torch" \
  build hypothesis matplotlib ninja numpy pybind11 pytest pytest-xdist "setuptools>=77" tqdm wheel

(cd "$root" && git ls-files -z | xargs -0 cp --parents --target-directory "$folder/source")
cd "$folder/source"
git init --quiet && git add . # some tests ask git which files there are
export MIXED_ATTENTION_CUDA=0 PATH=$bin:$PATH
"$bin/python" setup.py --quiet build_ext --inplace --build-temp "$folder/objects"
"$bin/python" -m mixed_attention
"$bin/python" -m pytest -q -n "$(nproc)" --dist worksteal "$@"
echo "torch $torch, Python $version: $(uname -sm), $(date +%Y-%m-%d), ${*:-the whole suite}"
