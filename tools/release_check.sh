#!/usr/bin/env bash
# Builds the source distribution and the wheel, installs each in a fresh environment, and tries it there.
#
# usage: release_check.sh PYTHON FOLDER
#   PYTHON  an interpreter that has the packages of requirements.txt
#   FOLDER  is emptied, and has the distributions in FOLDER/dist in the end
set -euo pipefail
python=$(realpath --no-symlinks "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$2" && mkdir -p "$2"
folder=$(realpath "$2")

# The wheel is built from the unpacked source distribution: what that lacks, a wheel from the checkout would hide.
"$python" -m build --no-isolation --outdir "$folder/dist" "$root"
sdist=("$folder"/dist/*.tar.gz) wheel=("$folder"/dist/*.whl)
[ ${#sdist[@]} = 1 ] && [ ${#wheel[@]} = 1 ]
version=$(basename "${sdist[0]}" .tar.gz) && version=${version#mixed_attention-}
[ "$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")" = "$version" ]
grep -q "^## \[$version\]" "$root/CHANGELOG.md" || echo "NOTE: CHANGELOG.md has no section for $version yet" >&2

try() { # NAME DISTRIBUTION PACKAGES...: installs the distribution and what it needs, and tries it outside of the checkout
  local environment=$folder/$1 distribution=$2
  "$python" -m venv "$environment"
  "$environment/bin/pip" install --quiet --constraint "$root/requirements.txt" "${@:3}"
  "$environment/bin/pip" install --quiet --no-build-isolation --no-deps "$distribution"
  (cd "$environment" && bin/python "$root/tools/release_smoke.py" "$version" && bin/python -m mixed_attention)
}

try wheel "${wheel[0]}" torch
try sdist "${sdist[0]}" torch pybind11 ninja setuptools
echo "both distributions of $version work; they are in $folder/dist"
