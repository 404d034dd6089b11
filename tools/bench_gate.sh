#!/usr/bin/env bash
# A short fixed set of rows of engine_bench, held against bench/gate.json: for most of them the least part of the roofline
# of the same run, and the most CPU. To be run before a change of what moves bytes is merged.
#
# usage: tools/bench_gate.sh [FOLDER] [--gate FILE] [--program FILE]     (default: . and engine_bench of the release build)
#
# FOLDER is on the disk to measure, and gets a file of 1 GiB and others as large, which are removed. engine_bench is built
# first, unless a program is named. The rows take two minutes on a disk of 3 GB/s and, if many miss, up to four: a row that
# misses is measured once more. Prints a table.
#
# Exit codes: 0 all rows hold; 1 a row is below; 2 wrong usage, or something could not be built, run or measured.
set -euo pipefail
# shellcheck source=tools/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
if [[ " $*" != *" --program"* ]]; then build_engine_bench >&2 || exit 2; fi
exec /usr/bin/python3 "$root/bench/bench_gate.py" "$@"
