#!/usr/bin/env bash
# Loads weights with the loaders of the real SGLang, its own and flashpack's, and compares them.
#
# usage: tools/sglang_load.sh [FOLDER]        (default: .cache/sglang)
#
# PyPI has SGLang's kernels for CUDA alone. Its modules for loading run without them, so that weights are loaded, but no
# tokens are generated. The packages go into FOLDER and stay there. Not part of tools/test.sh, because it takes minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/lib.sh
source tools/lib.sh

case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
mkdir -p "${1:-.cache/sglang}"
folder=$(cd "${1:-.cache/sglang}" && pwd)

# What the modules for loading import, of the many that SGLang requires.
imported=(
  aiohttp apache-tvm-ffi compressed_tensors dill fastapi gguf interegular msgspec orjson psutil pybase64 pydantic pyzmq
  sentencepiece transformers==5.19.0
)

make_venv
add_packages "$folder" sglang --no-deps sglang==0.5.23
add_packages "$folder" imported "${imported[@]}"
# It has to fit torch of tools/requirements.txt.
[[ -d $folder/torchvision ]] || pip_install --no-deps --target "$folder/torchvision" torchvision==0.29.2
rm -rf "$folder/flashpack" "$folder/models"
pip_install --no-deps --target "$folder/flashpack" "$root"
mkdir "$folder/models"

# The plug-in is found by its entry point.
export PYTHONPATH=$folder/flashpack:$folder/sglang:$folder/imported:$folder/torchvision
export SGLANG_PLUGINS=flashpack SGLANG_USE_CPU_ENGINE=1
"$python" tools/sglang_load.py "$folder/models"
