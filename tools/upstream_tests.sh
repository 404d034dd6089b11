#!/usr/bin/env bash
# Installs this package and runs against it those tests of the PyPI package whose place it takes that bind a drop-in. They
# are downloaded for the run; nothing of them is kept.
#
# usage: tools/upstream_tests.sh [PYTEST_OPTIONS...]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tools/lib.sh
source tools/lib.sh

case ${1:-} in
  -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;;
esac

# What a drop-in has to do, what costs little beyond that, and the command line.
expected=$((124 + 3 + 11))

# Of its insides, its own threads and its pinned memory; the network; its sources; speed. The behaviour behind them is
# tested here by other means.
other_files=(
  test_guardrails.py test_integration_api_guardrails.py test_integrations.py test_parallel_read.py
  test_parallel_read_integrity.py test_sample_probe.py test_speed_comparison.py test_wan_pipeline.py
)
other_tests=(
  # They download models.
  test_baseline.py::test_wan_transformer
  test_baseline.py::test_wan_text_encoder
  # Tensors on the CPU own their memory here, at the phase of their place in the file; mmap=True is the lazy way.
  test_cpu_parallel_read.py::test_cpu_parallel_default_off
  test_cpu_parallel_read.py::test_cpu_parallel_matches_mmap
  # They call or replace private functions, or numpy's that are not used here.
  test_cpu_parallel_read.py::test_page_cache_fraction_detects_warm_file
  test_distributed_load.py::test_broadcast_storage_is_dtype_agnostic
  test_distributed_load.py::test_shard_range_covers_disjoint_aligned
  test_distributed_load.py::test_plan_windows_tiles_blocks_exactly
  test_distributed_load.py::test_read_sharded_staged_fallback_matches
  test_distributed_load.py::test_sharded_one_rank_failure_is_synchronized
  test_serialization.py::test_no_temp_files_left_after_failure
  # No torch has this dtype yet.
  test_utils.py::TestPackingDtype::test_float4_rejected
)
# What those need of private names when the file is imported.
private_lines=(
  "    MacroblockSpec,"
  "    _broadcast_storage,"
  "    _plan_windows,"
  "    _shard_range,"
  "_real_inplace_probe = deserialization._supports_inplace_allgather"
)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

download() {
  "$python" -m pip download --quiet --disable-pip-version-check --no-binary :all: --no-deps --dest "$folder" \
    "flashpack==$reference_version" || return
  tar -xzf "$folder/flashpack-$reference_version.tar.gz" -C "$folder" --strip-components=1 \
    "flashpack-$reference_version/tests"
}

remove_files() {
  local file
  for file in "${other_files[@]}"; do
    rm "$folder/tests/$file" || fail "there is no $file any more"
  done
}

strip_private_lines() {
  local file=$folder/tests/test_distributed_load.py line
  for line in "${private_lines[@]}"; do
    [[ $(grep -cxF -e "$line" "$file") == 1 ]] || fail "test_distributed_load.py has not one line: $line"
    grep -vxF -e "$line" "$file" >"$file.new"
    mv "$file.new" "$file"
  done
}

# From its own folder and without PYTHONPATH, so that what is installed is what is tested.
run_tests() {
  cd "$folder/tests" || return
  "$python" -c 'import flashpack; assert flashpack.__implementation__ == "cpp", flashpack.__file__' || return
  "$python" -m pytest -q -c /dev/null -p no:cacheprovider "${other_tests[@]/#/--deselect=}" "$@" . |
    tee "$folder/output.txt"
}

unset PYTHONPATH
for command in install_packages make_venv install_flashpack; do
  "$command" >"$folder/log.txt" 2>&1 </dev/null || fail "$command failed: $(<"$folder/log.txt")"
done
download || fail "could not download flashpack $reference_version"
remove_files
strip_private_lines
require_tests "$folder/tests" "${other_tests[@]}"
(run_tests "$@")
result=$(tail -n 1 "$folder/output.txt")
[[ $result =~ ^"$expected passed, "[0-9]+" deselected"(", "[0-9]+" warning"s?)?" in " ]] ||
  fail "expected $expected passed and nothing else, got: $result"
