#!/usr/bin/env bash
# Makes the wheels that other machines install, and runs tests with each where there is nothing but Python and torch.
#
# usage: tools/wheel.sh [PYTHON...]
#
#   PYTHON  builds a wheel for its version and needs its headers (default: those of python3.10, python3.11 and python3.12
#           that are there). The wheel of python3.12 serves every newer version (abi3). 3.10 and 3.11 lack a part of the
#           stable ABI, so that each has a wheel of its own.
#
# The wheels are in build/wheels. They are for manylinux_2_34: glibc 2.34 or newer, as in RHEL 9, Debian 12 and Ubuntu 22.04.
# libstdc++, liburing, ISA-L and the CUDA runtime are inside. The runtime is that of CUDA 12, which serves more drivers.
#
# This runs as root on Debian 12, with network. The tests run without, in a root file system that has no compiler.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tools/lib.sh
source tools/lib.sh

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

wheels=$root/build/wheels
made=$wheels/made
bare=$wheels/root
results=$wheels/log
platform=manylinux_2_34_$(uname -m)
# Whole loads and saves, the engine's errors as exceptions, callbacks that raise, threads at the end of the interpreter.
tests=(tests/python/{package,round_trip,golden,mistakes,interrupt,exit,file,cli,tune_command}_test.py)

find_pythons() {
  local name
  for name in python3.10 python3.11 python3.12; do
    if "$name" -c '' 2>/dev/null; then
      pythons+=("$name")
    else
      echo "no $name here: no wheel for it"
    fi
  done
  ((${#pythons[@]})) || fail "name a Python to build with"
}

# A toolkit of the machine may be too new for the drivers that the wheel is for.
build() {
  rm -rf "$made"
  "$python" -m uv build --wheel --python "$1" --out-dir "$made" -C "build-dir=$wheels/build-{wheel_tag}" \
    -C cmake.define.CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON -C cmake.define.FLASHPACK_WITH_CUDA=ON . &&
    PATH=$venv/bin:$PATH auditwheel repair --plat "$platform" --wheel-dir "$made/repaired" "$made"/*.whl &&
    cp "$made"/repaired/*.whl "$wheels"
}

prepare() {
  [[ -e $bare/complete ]] || { make_bare_root "$bare" python3 && touch "$bare/complete"; } || return
  UV_HTTP_TIMEOUT=300 "$python" -m uv pip install --quiet --python "$1" --target "$wheels/packages-$2" \
    -r pyproject.toml pytest
}

# The files that the tests make are on a disk, because direct reads need one.
try() {
  local prefix interpreter there
  read -r prefix interpreter < <("$1" -c 'import os, sys; print(sys.base_prefix, os.path.realpath(sys.executable))')
  there=("$venv/bin/uv:/usr/local/bin/uv" "$wheels/packages-$2:/packages" "$root:/checkout" "$made/repaired:/wheels")
  [[ $prefix == /usr ]] || there+=("$prefix:$prefix")
  # shellcheck disable=SC2016
  in_bare_root "$bare" "${there[@]}" -- env -i PATH=/usr/bin:/bin HOME=/tmp LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 \
    bash -c '
      export PYTHONPATH=$HOME/site:/packages
      /usr/local/bin/uv pip install --quiet --offline --no-deps --python "$1" --target "$HOME/site" /wheels/*.whl &&
        cd /checkout && "$1" -m pytest -p no:cacheprovider --basetemp=/var/tmp/tests "${@:2}"
    ' bash "$interpreter" "${tests[@]}"
}

case ${1:-} in
  -h | --help) usage && exit ;;
  -*) usage >&2 && exit 2 ;;
esac
pythons=("$@")
(($#)) || find_pythons
rm -rf "$results"
mkdir -p "$results"
step build install install_packages mmdebstrap && step build venv make_venv || exit
for each in "${pythons[@]}"; do
  version=$("$each" -c 'import sys; print(*sys.version_info[:2], sep=".")') || fail "$each is no Python"
  step build "build-$version" build "$each" && step build "prepare-$version" prepare "$each" "$version" &&
    step check "tests-$version" try "$each" "$version" && ls -sh "$made"/repaired/*.whl
done
exec "$python" tools/tally.py "$results"
