#!/usr/bin/env bash
# Builds the source distribution and both wheels, installs them in fresh environments, and tries them there.
#
# usage: wheels.sh PYTHON FOLDER [KERNELS]
#   PYTHON   an interpreter that has the packages of requirements.txt
#   FOLDER   is emptied, and has the distributions in FOLDER/dist in the end
#   KERNELS  a wheel of mixed-attention-kernels that is there already; without it one is built, which wants nvcc
set -euo pipefail
python=$(realpath --no-symlinks "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
kernels=${3:+$(realpath "$3")}
rm -rf "$2" && mkdir -p "$2/dist"
folder=$(realpath "$2")
export MIXED_ATTENTION_CUDA=0 # the kernels have a wheel of their own

# The wheel is built from the unpacked source distribution: what that lacks, a wheel from the checkout would hide.
"$python" -m build --no-isolation --outdir "$folder/dist" "$root"
if [ -n "$kernels" ]; then
  cp "$kernels" "$folder/dist"
else
  "$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$folder/dist" "$root/kernels"
fi
sdist=("$folder"/dist/mixed_attention-*.tar.gz) wheel=("$folder"/dist/mixed_attention-*.whl)
kernels=("$folder"/dist/mixed_attention_kernels-*.whl)
[ ${#sdist[@]} = 1 ] && [ ${#wheel[@]} = 1 ] && [ ${#kernels[@]} = 1 ]
version=$(basename "${sdist[0]}" .tar.gz) && version=${version#mixed_attention-}
[ "$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")" = "$version" ]
grep -q "^## \[$version\]" "$root/CHANGELOG.md" || echo "NOTE: CHANGELOG.md has no section for $version yet" >&2

"$python" -m zipfile --extract "${kernels[0]}" "$folder/kernels"
"$python" "$root/tools/check_library.py" "$folder"/kernels/mixed_attention_kernels/*.so
size=$(stat --format %s "${kernels[0]}")
echo "${kernels[0]##*/}: $size bytes"
[ "$size" -lt 60000000 ]

try() { # NAME "PACKAGES" DISTRIBUTIONS...: tries distributions outside of the checkout, and uninstalls them again
  local environment=$folder/$1 packages names
  read -ra packages <<<"$2"
  "$python" -m venv "$environment"
  "$environment/bin/pip" install --quiet --constraint "$root/requirements.txt" "${packages[@]}"
  "$environment/bin/pip" install --quiet --no-build-isolation --no-deps "${@:3}"
  (cd "$environment" && bin/python "$root/tools/release_smoke.py" "$version" && bin/python -m mixed_attention)
  mapfile -t names < <("$environment/bin/pip" list --format freeze | sed -n 's/^\(mixed[-_]attention[^=]*\)=.*/\1/p')
  "$environment/bin/pip" uninstall --quiet --yes "${names[@]}"
  local left
  left=$(find "$environment" -iname '*mixed*attention*')
  [ -z "$left" ] || { echo "left behind: $left" >&2 && return 1; }
}

try wheels "torch" "${wheel[0]}" "${kernels[0]}"
try sdist "torch pybind11 ninja setuptools" "${sdist[0]}"
echo "the distributions of $version work; they are in $folder/dist"
