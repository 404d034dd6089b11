#!/usr/bin/env bash
# The engine's cold load beside the best fio read of the same file, in turns; prints the ratio of the medians.
#
# usage: tools/fio_compare.sh [FOLDER [SIZE_GIB [ROUNDS]]]     (default: . 2 7)
#
# FOLDER is on the disk to measure. Needs fio, and build/release/bench/engine_bench. fio reads into huge pages where it may
# reserve some (as root), because into small pages it shows half of the disk.
set -euo pipefail

folder=${1:-.}
size_gib=${2:-2}
rounds=${3:-7}
bench=$(dirname "${BASH_SOURCE[0]}")/../build/release/bench/engine_bench
file=$folder/fio_compare.flashpack
results=$(mktemp -d)
reserved=/proc/sys/vm/nr_hugepages
reserved_before=$(cat "$reserved")

case $folder in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
command -v fio >/dev/null || { echo "fio is missing: apt-get install fio" >&2 && exit 1; }
[[ -x $bench ]] || { echo "$bench is missing: cmake --build --preset release" >&2 && exit 1; }

# shellcheck disable=SC2317  # Called by the trap.
clean_up() {
  rm -rf "$results" "$file"
  if [[ -w $reserved ]]; then echo "$reserved_before" >"$reserved"; fi
}
trap clean_up EXIT

# 16 slots of 4 MiB, and some for alignment.
memory=malloc
if [[ -w $reserved ]] && echo $((reserved_before + 48)) >"$reserved" && (($(cat "$reserved") >= reserved_before + 48)); then
  memory=mmaphuge
else
  echo "no huge pages could be reserved: fio reads into small pages and shows less than the disk can do"
fi

# run_fio BLOCK_SIZE QUEUE_DEPTH ROUND
run_fio() {
  fio --name=read --filename="$file" --readonly --rw=read --direct=1 --invalidate=1 --ioengine=io_uring \
    --bs="$1" --iodepth="$2" --iomem="$memory" --fixedbufs=1 --registerfiles=1 \
    --output-format=json --output="$results/fio.$1.$2.$3.json"
}

run_engine() {
  "$bench" --file="$file" --size_gib="$size_gib" --rounds=1 --benchmark_filter=load/cold/touched_memory \
    --benchmark_out="$results/engine.$1.json" --benchmark_out_format=json >/dev/null 2>"$results/log" ||
    { cat "$results/log" >&2 && exit 1; }
}

# Makes the file, and finds what is wrong before the first round.
run_engine 0
for ((round = 1; round <= rounds; round++)); do
  run_fio 4M 8 "$round"
  run_engine "$round"
  run_fio 1M 8 "$round"
  run_fio 4M 16 "$round"
done
rm "$results/engine.0.json"

/usr/bin/python3 - "$results" <<'REPORT'
import json, pathlib, statistics, sys

rates = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    report = json.loads(path.read_text())
    if path.name.startswith("engine"):
        result = report["benchmarks"][0]
        if result.get("error_occurred"):
            sys.exit(result["error_message"])
        name, rate = "engine", result["GB/s"]
        raw = rates.setdefault("raw io_uring", [])
        raw.append(result["roof_GB/s"])
    else:
        _, block, depth, _, _ = path.name.split(".")
        name, rate = f"fio {block} x {depth}", report["jobs"][0]["read"]["bw_bytes"] / 1e9
    rates.setdefault(name, []).append(rate)

medians = {name: statistics.median(values) for name, values in rates.items()}
for name, values in rates.items():
    print(f"{name:14} {medians[name]:6.2f} GB/s   ({min(values):.2f} to {max(values):.2f}, {len(values)} rounds)")
best = max((name for name in medians if name.startswith("fio")), key=medians.get)
print(f"engine / best fio ({best}): {medians['engine'] / medians[best]:.2f}")
REPORT
