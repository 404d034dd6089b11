#!/usr/bin/env bash
# Whether loads to a GPU are right, and how fast they are; on a machine with a GPU and torch, without network.
#
# usage: tools/gpu_check.sh [check [FOLDER [STEP...]]]
#        tools/gpu_check.sh fetch PYTHON_VERSION
#        tools/gpu_check.sh wheel PYTHON
#        tools/gpu_check.sh rehearse [STEP...]
#
#   check  (default) runs the steps in this order, each with a limit of its own, whatever became of those before; what
#          they find is in FOLDER (default: gpu_check) and printed as soon as each has ended:
#            load      builds the Python package; one load, compared on the device
#            table     start of an engine, rooflines, loads beside peers: device_bench.json and .md
#            pytest    the Python tests that need a GPU
#            ctest     the C++ tests of the device path, none of the GPU's skipped
#            memcheck  compute-sanitizer over one load and a kernel on another stream right after it
#            sweep     the options of an engine: device_sweep.json and .md
#            process   (only when it is named) the C++ tests of the GPU in one process, where a failure of the context that
#                      one of them leaves behind fails those that follow
#            suite     (only when it is named) all other tests, C++ and Python
#            tune      (only when it is named) flashpack_tune, loads to the first GPU: tune.txt and .json; and what
#                      flashpack_probe tells of the profile
#   fetch  on a machine with network: puts what `check` may lack into .gpu, to be carried along with the source, 60 MiB
#          at most in all: Debian packages and pip to build with, the headers of a Python like 3.12, and peers.
#   wheel  after `fetch`: builds the Python package by PYTHON, like python3.12, into .gpu, so that `check` need not, as
#          long as it finds the same sources.
#   rehearse  as root on Debian 12 with network: runs `check` on a copy of the tracked files and of what `fetch` brings,
#          in a bare root file system without network, where nvidia-smi, the CUDA runtime and torch.cuda have stand-ins. Its
#          checkpoints are small, its limits wide, and of the Python tests it runs those that work on the stand-ins.
#
# GPU_CHECK_DIR is on the disk to measure (default: /var/tmp); after GPU_CHECK_SECONDS (default: 540) everything has
# ended. A step that is cut short still shows what it has found. GPU_CHECK_SLOWER (default: 1) multiplies all limits, GPU_CHECK_SCALE (default: 1) the sizes of checkpoints.
# The machine has a C++ compiler, a CUDA toolkit from 12.4 on or the wheels of the runtime, and a python3 with torch,
# numpy, nanobind, scikit-build-core, cmake, ninja, pytest, safetensors, click and tqdm.
set -uo pipefail
called_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tools/lib.sh
source tools/lib.sh

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

carried=${GPU_CHECK_CARRIED:-$root/.gpu}
made=$root/build/gpu
sysroot=$made/sysroot
site=$made/site
python=$(command -v python3)
carried_limit_mib=60
# A toolkit of the machine goes before these.
cuda_of_wheels=("-DCudaRuntime_INCLUDE_DIR=$made/cuda/nvidia/cu13/include" "-DCudaRuntime_LIBRARY=$made/cuda/nvidia/cu13/lib/libcudart_static.a")
slower=${GPU_CHECK_SLOWER:-1}
scale=${GPU_CHECK_SCALE:-1}
steps=(load table pytest ctest memcheck sweep)
# Seconds. Those of the steps above are less than what all have together, so that no step takes the time of another.
declare -A limits=([carried]=20 [load]=85 [table]=215 [pytest]=90 [ctest]=60 [memcheck]=20 [sweep]=45 [process]=90 [suite]=500 [tune]=240)

packages=(
  liburing2 liburing-dev libisal2 libisal-dev libboost1.81-dev libgtest-dev libgmock-dev libcli11-dev
  libbenchmark-dev libbenchmark1debian pkgconf-bin libpkgconf3
)
cuda_wheels=('nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*')
# A line for each peer: its name in device_bench.py, and its wheels.
peers="flashpack-$reference_version flashpack==$reference_version
safetensors-0.9.0rc1 safetensors==0.9.0rc1
fastsafetensors fastsafetensors==0.5.0
instanttensor instanttensor==0.2.2
runai-model-streamer runai-model-streamer==0.17.0 humanize==4.12.3"

fetch() {
  local version=$1 name wheels status=0
  rm -rf "$carried"
  mkdir -p "$carried/debs" "$carried/pip"
  (cd "$carried/debs" && apt-get -q download "${packages[@]}" && fetch_python_headers "$version") || return
  "$python" -m pip download --quiet --no-deps --dest "$carried/pip" pip || return
  fetch_wheels "$version" "$carried/cuda" "${cuda_wheels[@]}" || return
  while read -r name wheels; do
    # shellcheck disable=SC2086  # A list of words.
    fetch_wheels "$version" "$carried/peers/$name" $wheels || { echo "no wheels of $name for Python $version" && status=1; }
  done <<<"$peers"
  local files
  files=$(find "$carried" -type f -printf '%P\n' | sort) && printf '%s\n' "$files" >"$carried/manifest" || return
  check_size && return "$status"
}

# Debian and Ubuntu have each version of Python in one of their releases only.
fetch_python_headers() {
  local noble=http://archive.ubuntu.com/ubuntu/pool/main/p/python3.12/libpython3.12-dev_3.12.3-1_amd64.deb
  if apt-cache show "libpython$1-dev" >/dev/null 2>&1; then
    apt-get -q download "libpython$1-dev"
  elif [[ $1 == 3.12 ]]; then
    curl -sSfO "$noble"
  else
    echo "the headers of Python $1 are not in this release: the machine must have them"
  fi
}

fetch_wheels() {
  local version=$1 to=$2 platforms=() platform
  shift 2
  for platform in manylinux_2_30 manylinux_2_28 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${platform}_x86_64")
  done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --platform any --dest "$to" "$@"
}

check_size() {
  local size_mib
  size_mib=$({ git ls-files -z && find "$carried" -type f -print0; } | du -c -m --apparent-size --files0-from=- | tail -n 1 | cut -f 1)
  echo "$size_mib MiB to carry, of $carried_limit_mib"
  ((size_mib <= carried_limit_mib))
}

source_sum() {
  find CMakeLists.txt pyproject.toml LICENSE engine include torch_binding -type f ! -name '*.pyc' -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

build_wheel() {
  rm -rf "$carried/wheel"
  "$1" -m pip wheel --quiet --no-deps --wheel-dir "$carried/wheel" . || return
  source_sum >"$carried/wheel/sources"
  check_size
}

# What was carried serves where the machine itself has nothing.
run_carried() {
  local file deb install status=0 installs=()
  [[ -e $carried/manifest ]] || { echo "nothing is carried: the machine has to have it all" && return; }
  while read -r file; do
    [[ -e $carried/$file ]] || { echo "not carried: $(basename "$file")" && status=1; }
  done <"$carried/manifest"
  cmp -s "$carried/manifest" "$made/manifest" && return "$status"
  rm -rf "$sysroot" "$made"/{peers,cuda}
  mkdir -p "$sysroot"
  for deb in "$carried"/debs/*.deb; do
    dpkg -x "$deb" "$sysroot" || status=1
  done
  # They say where they would have been installed.
  sed -i "s|^prefix=/usr|prefix=$sysroot/usr|; s|=/usr/|=$sysroot/usr/|" "$sysroot"/usr/lib/x86_64-linux-gnu/pkgconfig/*.pc
  command -v pkg-config >/dev/null || ln -sf pkgconf "$sysroot/usr/bin/pkg-config"
  pip_install_from "$carried"/cuda/*.whl --target "$made/cuda" || status=1
  for file in "$carried"/peers/*; do
    pip_install_from "$file"/*.whl --target "$made/peers/$(basename "$file")" &
    installs+=($!)
  done
  # A plain wait would wait for a caller's output filter, too, which ends after this.
  for install in "${installs[@]}"; do
    wait "$install" || status=1
  done
  ((status)) || cp "$carried/manifest" "$made/manifest"
  return "$status"
}

use_carried() {
  local lib=$sysroot/usr/lib/x86_64-linux-gnu
  export CMAKE_PREFIX_PATH=$sysroot/usr${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}
  export PKG_CONFIG_PATH=$lib/pkgconfig LD_LIBRARY_PATH=$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  export CPLUS_INCLUDE_PATH=$sysroot/usr/include C_INCLUDE_PATH=$sysroot/usr/include
  export PATH=$PATH:$sysroot/usr/bin
}

# The environment of a torch may have no pip.
pip_install_from() {
  local pip=("$carried"/pip/pip-*.whl)
  if [[ -e ${pip[0]} ]]; then pip=("${pip[0]}/pip"); else pip=(-m pip); fi
  "$python" "${pip[@]}" --quiet --disable-pip-version-check --no-cache-dir install --no-index --no-deps "$@"
}

install_python_package() {
  local include options=() option
  rm -rf "$site"
  if [[ $(cat "$carried/wheel/sources" 2>/dev/null) == "$(source_sum)" ]]; then
    pip_install_from "$carried"/wheel/*.whl --target "$site" && return
  fi
  for option in "${cuda_of_wheels[@]}"; do
    options+=(-C "cmake.define.${option#-D}")
  done
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [[ -e $include/Python.h ]] || options+=(-C "cmake.define.Python_INCLUDE_DIR=$sysroot/usr/include/$(basename "$include")")
  pip_install_from --no-build-isolation --target "$site" "${options[@]}" .
}

need_package() { [[ -d $site/flashpack ]] || install_python_package; }

run_load() {
  "$python" -c 'import torch; print(torch.__version__); assert torch.cuda.is_available()' || return
  install_python_package && "$python" tools/device_first_load.py --dir "$disk" --size_gib "$scale"
}

# Checkpoints of 8 GiB do not fit: to write one and to load it cold by each peer takes longer than all else.
run_table() { need_package && measure device_bench 195 start parts blocks-2 small-2; }
run_sweep() { need_package && measure device_sweep 35 sweep; }

measure() {
  local name=$1 seconds=$2
  shift 2
  "$python" tools/device_bench.py "$@" --dir "$disk" --seconds "$seconds" --scale "$scale" --out "$out/$name" \
    --packages "$made/peers"
}

run_pytest() {
  local tests
  need_package || return
  mapfile -t tests < <(grep -l 'mark\.gpu' tests/python/*_test.py)
  "$python" -m pytest -v -m gpu "${tests[@]}" --continue-on-collection-errors --junitxml="$out/pytest.xml"
}

# Another compiler has other warnings.
configure_here() { configure release -DFLASHPACK_WERROR=OFF "${cuda_of_wheels[@]}" "$@"; }

build_tests_of_the_device() {
  configure_here -B build/gpu/cpp -DFLASHPACK_BUILD_{TORCH,TOOLS,BENCH}=OFF &&
    cmake --build build/gpu/cpp --target "$@"
}

run_process() { build_tests_of_the_device gpu_test && build/gpu/cpp/tests/engine/gpu_test --gtest_brief=1; }

run_ctest() {
  build_tests_of_the_device gpu_test cuda_test &&
    ctest --test-dir build/gpu/cpp/tests/engine -R 'Gpu|Cuda|Device' --output-on-failure --parallel 4 \
      --no-tests=error --output-junit "$out/ctest.xml"
}

run_memcheck() {
  local tool
  tool=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || fail "no compute-sanitizer here"
  need_package && "$tool" --tool memcheck --error-exitcode 9 \
    "$python" tools/device_first_load.py --dir "$disk" --size_gib 0.02
}

run_suite() {
  configure_here && cmake --build --preset release &&
    ctest --preset release --parallel "$(nproc)" --no-tests=error --output-junit "$out/suite.xml"
  need_package && "$python" -m pytest tests/python --junitxml="$out/pytest_all.xml"
}

# The profile goes away with the disk's folder. Status 3 is for a disk that cannot be recognised another time.
run_tune() {
  local tools=$root/build/gpu/tune/tools status
  configure_here -B build/gpu/tune -DFLASHPACK_BUILD_{TORCH,TESTS,BENCH,C,PYTHON}=OFF &&
    cmake --build build/gpu/tune --target flashpack_tune flashpack_probe || return
  export XDG_CONFIG_HOME=$disk/config
  "$tools/flashpack_tune" "$disk" --device cuda:0 --size_gib "$scale" --json_file "$out/tune.json" >"$out/tune.txt"
  status=$?
  cat "$out/tune.txt"
  "$tools/flashpack_probe" "$disk" | tee -a "$out/tune.txt"
  return $((status == 3 ? 0 : status))
}

# Everything a step needs, so that it runs alone.
run_step() {
  out=$2
  disk=$(mktemp -d "${GPU_CHECK_DIR:-/var/tmp}/gpu_check.XXXXXX") || return
  trap 'rm -rf "$disk"' EXIT
  export FLASHPACK_REQUIRE_GPU=1 PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  command -v ccache >/dev/null || unset CMAKE_CXX_COMPILER_LAUNCHER
  use_carried
  [[ -e $made/cuda ]] || cuda_of_wheels=()
  "run_$1"
}

# limited NAME: the step NAME, within its limit and what is left for all.
limited() {
  local name=$1 left=$((${GPU_CHECK_SECONDS:-540} * slower - SECONDS)) kind=check
  [[ $name == pytest || $name == ctest || $name == suite ]] && kind=suite
  local limit=$((limits[$name] * slower))
  ((limit <= left)) || limit=$left
  if ((limit < 5)); then
    echo "$name: no time is left"
    printf 'check\t%s\t124\n' "$name" >>"$results/steps.tsv"
    return
  fi
  step "$kind" "$name" timeout --signal=INT --kill-after=10 "$limit" \
    bash "$root/tools/gpu_check.sh" step "$name" "$results"
  case $name in
    carried) grep '^not carried' "$results/$name.log" ;;
    load) tail -n 3 "$results/$name.log" ;;
    table) cat "$results/device_bench.md" ;;
    sweep) cat "$results/device_sweep.md" ;;
    tune) cat "$results/tune.txt" ;;
  esac 2>/dev/null
}

check() {
  local name
  results=$1
  shift
  (($#)) || set -- "${steps[@]}"
  for name in "$@"; do
    [[ -n ${limits[$name]:-} ]] || fail "no such step: $name"
  done
  nvidia-smi -L 2>/dev/null || fail "no NVIDIA GPU here: nvidia-smi lists none"
  [[ $results == /* ]] || results=$called_in/$results
  mkdir -p "$results" "$made"
  # Those of an earlier check would be taken for its own.
  rm -f "$results"/{steps.tsv,device_bench.*,device_sweep.*,tune.txt,tune.json,pytest.xml,ctest.xml,suite.xml,pytest_all.xml}
  for name in carried "$@"; do
    limited "$name"
  done
  "$python" tools/tally.py "$results"
}

# A machine as the one that `check` is for, but for the speed: nothing of the build that was not carried.
make_root() {
  local cuda=$bare/usr/local/cuda
  rm -rf "$rehearsal/cuda"
  make_bare_root "$bare" python3,g++,cmake,ninja-build || return
  "$python" -m pip install --quiet --target "$rehearsal/cuda" "${cuda_wheels[@]}" || return
  mkdir -p "$cuda"/{bin,lib64} "$bare/stand_in"
  cp -r "$rehearsal"/cuda/nvidia/cu13/include "$cuda"
  printf '#!/bin/sh\necho "Cuda compilation tools, release 13.0, V13.0.88"\n' >"$cuda/bin/nvcc"
  # Its own options, each with a value, come before the program.
  # shellcheck disable=SC2016
  printf '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift 2; done\nexec "$@"\n' >"$cuda/bin/compute-sanitizer"
  printf '#!/bin/sh\necho "GPU 0: a stand-in"\n' >"$bare/usr/bin/nvidia-smi"
  chmod +x "$cuda"/bin/* "$bare/usr/bin/nvidia-smi"
  touch "$bare/complete"
}

# The tests' own CUDA runtime, in the place of the real one.
make_stand_ins() {
  local cuda=$bare/usr/local/cuda name
  rm -f "$cuda/lib64/libcudart_static.a" "$rehearsal"/*.o
  for name in tests/support/{fake_cuda,fake_cudart,bulk,stand_in/cudart}; do
    g++ -std=c++20 -O2 -fPIC -w -I. -I"$cuda/include" -c "$name.cc" -o "$rehearsal/$(basename "$name").o" || return
  done
  ar rcs "$cuda/lib64/libcudart_static.a" "$rehearsal"/*.o && touch "$cuda/lib64/libcudart.so"
  cp tests/support/stand_in/sitecustomize.py "$bare/stand_in"
}

rehearse() {
  local rehearsal=$root/build/rehearsal bare=$root/build/rehearsal/bare check=$root/build/rehearsal/bare/check
  install_packages mmdebstrap >/dev/null || return
  python=$venv/bin/python
  "$python" -c 'import torch' 2>/dev/null || make_venv || return
  [[ -e $bare/complete ]] || make_root || fail "the bare root file system cannot be made"
  [[ -e $rehearsal/.gpu/manifest ]] || GPU_CHECK_CARRIED=$rehearsal/.gpu PATH=$venv/bin:$PATH bash "$root/tools/gpu_check.sh" fetch 3.11 || return
  make_stand_ins || return
  rm -rf "$check"
  mkdir "$check"
  git ls-files -z | tar -c --null -T - | tar -x -C "$check"
  cp -r "$rehearsal/.gpu" "$check"
  # The Python tests are those that look at no device and start no thread.
  in_bare_root "$bare" "$(realpath "$venv"):/torch" -- env PATH=/torch/bin:/usr/bin:/bin HOME=/tmp LC_ALL=C.UTF-8 PYTHONPATH=/stand_in \
    GPU_CHECK_SLOWER=$((1 + 15 / $(nproc))) GPU_CHECK_SCALE=0.02 PYTEST_ADDOPTS="-k 'every_dtype or two_devices'" \
    bash check/tools/gpu_check.sh check /check/gpu_check "$@"
}

case ${1:-check} in
  check) check "${2:-gpu_check}" "${@:3}" ;;
  step) run_step "$2" "$3" ;;
  wheel) [[ $# == 2 ]] || { usage >&2 && exit 2; } && build_wheel "$2" ;;
  rehearse) rehearse "${@:2}" ;;
  sources) source_sum ;;
  fetch) [[ $# == 2 ]] || { usage >&2 && exit 2; } && fetch "$2" ;;
  -h | --help) usage ;;
  *) usage >&2 && exit 2 ;;
esac
