#!/usr/bin/env bash
# The engine's cold load beside the best fio read of the same file, and its durable store of a new file beside the best
# fio write of one, in turns; prints the ratios of the medians.
#
# usage: tools/fio_compare.sh [FOLDER [SIZE_GIB [ROUNDS [read|write]]]]     (default: . 2 7, both)
#
# FOLDER is on the disk to measure. Needs fio, and builds engine_bench. fio uses huge pages where it may
# reserve some (as root), because with small pages it shows half of the disk. What fio writes is allocated before its
# clock starts and synced before it stops.
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

folder=${1:-.}
size_gib=${2:-2}
rounds=${3:-7}
directions=${4:-read write}
bench=$root/build/release/bench/engine_bench
file=$folder/fio_compare.flashpack
reserved=/proc/sys/vm/nr_hugepages
reserved_before=$(cat "$reserved")

case $folder in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
command -v fio >/dev/null || { echo "fio is missing: apt-get install fio" >&2 && exit 1; }
case $directions in read | write | "read write") ;; *) echo "neither read nor write: $directions" >&2 && exit 2 ;; esac
build_engine_bench >&2 || fail "engine_bench could not be built"

# shellcheck disable=SC2317  # Called by the trap.
clean_up() {
  rm -rf "${results:-}" "$file" "$file.fio"
  if [[ -w $reserved ]]; then echo "$reserved_before" >"$reserved"; fi
}
trap clean_up EXIT
results=$(mktemp -d)

# 16 slots of 4 MiB, and some for alignment.
memory=malloc
if [[ -w $reserved ]] && echo $((reserved_before + 48)) >"$reserved" && (($(cat "$reserved") >= reserved_before + 48)); then
  memory=mmaphuge
else
  echo "no huge pages could be reserved: fio uses small pages and shows less than the disk can do"
fi

# run_fio DIRECTION BLOCK_SIZE QUEUE_DEPTH ROUND
run_fio() {
  local job=(--filename="$file" --readonly)
  if [[ $1 == write ]]; then
    rm -f "$file.fio"
    job=(--filename="$file.fio" --size="$payload" --fallocate=native --end_fsync=1 --scramble_buffers=0)
  fi
  fio --name="$1" "${job[@]}" --rw="$1" --direct=1 --invalidate=1 --ioengine=io_uring \
    --bs="$2" --iodepth="$3" --iomem="$memory" --fixedbufs=1 --registerfiles=1 \
    --output-format=json --output="$results/$1.fio.$2.$3.$4.json"
}

declare -A lines=([read]=load/cold/touched_memory [write]=store/durable/new_file)

# run_engine DIRECTION ROUND
run_engine() {
  "$bench" --file="$file" --size_gib="$size_gib" --rounds=1 --benchmark_filter="${lines[$1]}" \
    --benchmark_out="$results/$1.engine.$2.json" --benchmark_out_format=json >/dev/null 2>"$results/log" ||
    { cat "$results/log" >&2 && exit 1; }
}

for direction in $directions; do
  # Makes the file, and finds what is wrong before the first round.
  run_engine "$direction" 0
  rm "$results/$direction.engine.0.json"
  # Whole blocks of fio's.
  payload=$(($(stat -c %s "$file") >> 22 << 22))
  for ((round = 1; round <= rounds; round++)); do
    run_fio "$direction" 4M 8 "$round"
    run_engine "$direction" "$round"
    run_fio "$direction" 1M 8 "$round"
    run_fio "$direction" 4M 16 "$round"
  done
done

/usr/bin/python3 - "$results" <<'REPORT'
import json, pathlib, statistics, sys

rates = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    report = json.loads(path.read_text())
    direction, program, *setting = path.name.split(".")
    if program == "engine":
        result = report["benchmarks"][0]
        if result.get("error_occurred"):
            sys.exit(result["error_message"])
        found = {"engine": result["GB/s"], "raw io_uring": result["roof_GB/s"]}
        if "checksums_GB/s" in result:
            found["engine, checksums"] = result["checksums_GB/s"]
    else:
        found = {f"fio {setting[0]} x {setting[1]}": report["jobs"][0][direction]["bw_bytes"] / 1e9}
    for name, rate in found.items():
        rates.setdefault(direction, {}).setdefault(name, []).append(rate)

for direction, series in rates.items():
    print({"read": "cold load", "write": "durable store of a new file"}[direction])
    medians = {name: statistics.median(values) for name, values in series.items()}
    for name, values in series.items():
        print(f"  {name:17} {medians[name]:6.2f} GB/s   ({min(values):.2f} to {max(values):.2f}, {len(values)} rounds)")
    best = max((name for name in medians if name.startswith("fio")), key=medians.get)
    for name in (name for name in medians if name.startswith("engine")):
        print(f"  {name} / best fio ({best}): {medians[name] / medians[best]:.2f}")
REPORT
