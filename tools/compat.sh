#!/usr/bin/env bash
# The Python tests, and those of the C++ binding of LibTorch, with the newest versions of torch and of the libraries that
# are integrated, and with the oldest supported ones; prints a table.
#
# usage: tools/compat.sh [newest|oldest]...     (default: both)
#
# Each set gets a virtual environment of its own in .cache, of several GB. Not part of tools/test.sh, which runs pinned
# versions: what `newest` means changes from day to day.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tools/lib.sh
source tools/lib.sh

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

# The floors of pyproject.toml.
declare -A requirements=(
  [oldest]="torch==2.6.0 transformers==4.57.1 diffusers==0.38.0 accelerate==1.2.1 numpy<2.3"
  [newest]="torch transformers diffusers accelerate numpy"
)

case ${1:-} in -h | --help) usage && exit ;; esac
(($#)) || set -- newest oldest
for name in "$@"; do
  [[ -n ${requirements[$name]:-} ]] || { usage >&2 && exit 2; }
done

install_packages >/dev/null || exit 1
make_venv && make_reference_venv || exit 1
export FLASHPACK_REFERENCE_PYTHON=$reference_python
results=$root/.cache/compat
rm -rf "$results"
mkdir -p "$results"
"$python" -m uv build --quiet --wheel --python "$python" --out-dir "$results" "$root" || fail "the package cannot be built"

# set_up NAME REQUIREMENT...: an environment with the package and these.
set_up() {
  local name=$1 at=$root/.cache/compat-$1
  shift
  rm -rf "$at"
  /usr/bin/python3 -m venv --without-pip "$at"
  UV_HTTP_TIMEOUT=300 "$python" -m uv pip install --quiet --python "$at/bin/python" "$results"/*.whl pytest "$@"
}

# test_libtorch PYTHON BUILD: the C++ binding, compiled with the headers of that environment's torch. PyPI's wheel of 2.6
# has another std::string than C++ programs of today: the binding cannot be linked to it, and is only compiled.
test_libtorch() {
  local include file
  if ! "$1" -c 'import sys, torch; sys.exit(not torch.compiled_with_cxx11_abi())'; then
    include=$("$1" -c 'import torch, os; print(os.path.join(os.path.dirname(torch.__file__), "include"))')
    for file in torch_binding/libtorch/*.cc; do
      c++ -std=c++20 -fsyntax-only -I. -Iinclude -isystem "$include" -isystem "$include/torch/csrc/api/include" "$file" || return
    done
    return
  fi
  cmake -S "$root" -B "$2" -DCMAKE_BUILD_TYPE=Release -DPython3_EXECUTABLE="$1" -DFLASHPACK_BUILD_PYTHON=OFF &&
    cmake --build "$2" --target torch_test && "$2/tests/libtorch/torch_test" --gtest_brief=1
}

versions='import importlib.metadata as m, sys
names = ("torch", "transformers", "diffusers", "accelerate", "huggingface_hub")
print(" | ".join(m.version(name) for name in names), "|", sys.argv[1])'

rows=()
failed=0
for name in "$@"; do
  # shellcheck disable=SC2086  # A list of words.
  set_up "$name" ${requirements[$name]} || fail "the environment of $name cannot be made"
  at=$root/.cache/compat-$name/bin/python
  "$at" -m pytest -q tests/python >"$results/$name.log" 2>&1 || failed=1
  test_libtorch "$at" "$results/build-$name" >"$results/libtorch-$name.log" 2>&1 && libtorch=passed || libtorch=FAILED
  [[ $libtorch == passed ]] || failed=1
  outcome=$(tail -n 1 "$results/$name.log" | sed 's/ in [0-9].*//; s/=//g')
  rows+=("| $name | $("$at" -c "$versions" "$outcome") | $libtorch |")
  grep -E '^(FAILED|ERROR)' "$results/$name.log"
done
printf '| set | torch | transformers | diffusers | accelerate | huggingface_hub | tests | torch_test |\n|---|---|---|---|---|---|---|---|\n'
printf '%s\n' "${rows[@]}"
exit "$failed"
