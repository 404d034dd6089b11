#!/usr/bin/env bash
# Installs what is missing and runs every check there is.
#
# usage: tools/test.sh [all|fast]
#
#   all   (default) release build with LibTorch and Python, host-only and sanitizer builds, fuzzers, quickstart, linters
#   fast  the release build's tests, pytest and the linters
#
# A step that breaks counts as a failure and the rest still runs. Logs and JUnit files are in .cache/test. The last
# line is "N passed, N failed, N skipped", with what failed and what was skipped named above it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tools/lib.sh
source tools/lib.sh

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

scope=${1:-all}
case $scope in
  all | fast) ;;
  -h | --help) usage && exit ;;
  *) usage >&2 && exit 2 ;;
esac

trap end_what_is_beside EXIT
trap 'exit 130' INT

rm -rf "$results"
mkdir -p "$results"

install_everything() {
  local packages=(shellcheck libfuse3-dev fuse3)
  [[ $scope == fast ]] || packages+=(clang-19 libclang-rt-19-dev)
  install_packages "${packages[@]}" && make_venv || return
  fetch_cuda_headers || echo "no CUDA headers: their tests will be skipped"
}

# As its users do: over the package whose place it takes.
install_over_the_reference() {
  pip_install --no-deps "flashpack==$reference_version" && install_flashpack
}

# run_pytest HALF: every other file, because most of the time goes into processes that import torch, one after the other.
run_pytest() {
  local files=(tests/tools/*_test.py tests/python/*_test.py) mine=() i
  for ((i = $1 - 1; i < ${#files[@]}; i += 2)); do mine+=("${files[i]}"); done
  "$python" -m pytest "${mine[@]}" --junitxml="$results/pytest-$1.xml"
}

# The libraries without CUDA and LibTorch, and the tests of what is different then.
build_host_only() {
  configure host-only && cmake --build --preset host-only --target flashpack_format copier_none_test
}

lint_python() {
  "$python" -m ruff check . && "$python" -m ruff format --check .
}

# Tests leave cores idle: the next preset is built beside those of the last one.
step build install install_everything
if [[ $scope == all ]]; then start_build release -DFLASHPACK_UNITY=ON; else start_build release; fi
wait "${builds[release]}"
[[ $scope == fast ]] || start_build asan
ctest_preset release
step suite torch_test build/release/tests/libtorch/torch_test --gtest_output="xml:$results/torch_test.xml"
step check headers cmake --build --preset release --target all_verify_interface_header_sets
# Without it, the tests that need it are counted as skipped.
step build reference make_reference_venv && export FLASHPACK_REFERENCE_PYTHON=$reference_python
if step build package install_over_the_reference; then
  beside step suite pytest-1 run_pytest 1
  first=$!
  step suite pytest-2 run_pytest 2
  wait "$first"
fi
step check tidy "$python" tools/tidy.py
step check shellcheck shellcheck tools/*.sh .ci/run
step check ruff lint_python
step check mypy "$python" -m mypy torch_binding/python/flashpack
if [[ $scope == all ]]; then
  step build host-only-build build_host_only &&
    step suite host-only ctest --preset host-only --tests-regex '^WithoutCuda' --no-tests=error \
      --output-junit "$results/host-only.xml"
  start_build tsan
  ctest_preset asan
  ctest_preset tsan
  step check quickstart tools/quickstart.sh
fi

printf '%-23s %4d s\n' total "$SECONDS"
exec /usr/bin/python3 tools/tally.py "$results"
