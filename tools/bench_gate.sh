#!/usr/bin/env bash
# A short fixed set of rows of engine_bench, held against bench/gate.json: for each row the least part of the roofline of
# the same run, and the most CPU. To be run before a change of what moves bytes is merged.
#
# usage: tools/bench_gate.sh [FOLDER] [--gate FILE] [--program FILE]     (default: . and the release build's engine_bench)
#
# FOLDER is on the disk to measure, and gets a file of 1 GiB and others as large, which are removed. It takes two
# minutes on a disk of 3 GB/s and, if many rows miss, up to four: a row that misses is measured once more. Prints a table.
#
# Exit codes: 0 all rows hold; 1 a row is below; 2 wrong usage, or something could not be run or measured.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
exec /usr/bin/python3 "$root/bench/bench_gate.py" "$@"
