#!/usr/bin/env bash
# Installs this package and runs safetensors' own tests of its torch API against flashpack.safetensors. They are downloaded
# for the run; nothing of them is kept.
#
# usage: tools/safetensors_tests.sh [PYTEST_OPTIONS...]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tools/lib.sh
source tools/lib.sh

case ${1:-} in
  -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;;
esac

# This version has tests of every version before it, and those of prefetch().
version=0.9.0rc1
# Without a GPU. Those that are skipped need one, or a device that this package leaves to safetensors.
expected="65 passed, 38 skipped"

# The others are for frameworks that this package leaves to safetensors, or for writing.
files=(test_multithreaded.py test_pread_backend.py test_pt_comparison.py test_pt_model.py test_simple.py)
other_tests=(
  # An error of the system has its number and the file's name here, as Python's own errors do.
  test_simple.py::test_file_not_found
  # prefetch() loads to the CPU, too.
  test_pread_backend.py::test_prefetch_device_overrides_the_handle
  test_pread_backend.py::test_prefetch_requires_cuda
  test_pread_backend.py::test_prefetch_works_from_any_backend
  # A file with a dtype that torch lacks is refused when it is opened.
  test_pread_backend.py::test_prefetch_rejects_unsupported_dtype
  # For numpy the handle is that of the installed safetensors, and only 0.9 has prefetch().
  test_pread_backend.py::test_prefetch_requires_pt
)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# pip asks the build backend of a source distribution for its name and version. That of safetensors needs Rust, so that a
# stand-in answers.
download() {
  mkdir "$folder/backend"
  cat >"$folder/backend/maturin.py" <<'EOF'
import pathlib, shutil
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    info = pathlib.Path(directory, "safetensors.dist-info")
    info.mkdir()
    shutil.copy("PKG-INFO", info / "METADATA")
    return info.name
EOF
  PYTHONPATH=$folder/backend "$python" -m pip download --quiet --disable-pip-version-check --no-binary :all: --no-deps \
    --no-build-isolation --dest "$folder" "safetensors==$version" || return
  tar -xzf "$folder/safetensors-$version.tar.gz" -C "$folder" --strip-components=3 \
    "safetensors-$version/bindings/python/tests"
}

# The tests import by name what they test.
turn_to_flashpack() {
  cd "$folder/tests" || return
  sed -i -E 's/^( *)from safetensors(\.torch)? import/\1from flashpack.safetensors\2 import/' "${files[@]}"
}

# Without PYTHONPATH, so that what is installed is what is tested.
run_tests() {
  cd "$folder" || return
  local test names=""
  for test in "${other_tests[@]}"; do names+="${names:+ or }${test##*::}"; done
  "$python" -m pytest -q -c /dev/null -p no:cacheprovider -k "not ($names)" "$@" "${files[@]/#/tests/}" |
    tee "$folder/output.txt"
}

unset PYTHONPATH
for command in install_packages make_venv install_flashpack; do
  "$command" >"$folder/log.txt" 2>&1 </dev/null || fail "$command failed: $(<"$folder/log.txt")"
done
download || fail "could not download safetensors $version"
(turn_to_flashpack) || fail "safetensors $version has other files of tests"
require_tests "$folder/tests" "${other_tests[@]}"
(run_tests "$@")
result=$(tail -n 1 "$folder/output.txt")
[[ $result =~ ^"$expected, ${#other_tests[@]} deselected"(", "[0-9]+" warning"s?)?" in " ]] ||
  fail "expected $expected, ${#other_tests[@]} deselected and nothing else, got: $result"
