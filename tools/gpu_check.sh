#!/usr/bin/env bash
# All tests on a machine with a GPU, and how fast files come to the device there; without network.
#
# usage: tools/gpu_check.sh [check [FOLDER]]
#        tools/gpu_check.sh fetch PYTHON_VERSION
#
#   check  (default) builds with the torch of python3, runs all tests with FLASHPACK_REQUIRE_GPU=1 and measures loads
#          beside disk, link, memory and peers. FOLDER (default gpu_check) gets device_bench.json and device_bench.md.
#   fetch  on a machine with network: puts what `check` may lack into .gpu, to be carried along: Debian packages to
#          build with, and peers to measure for a Python like 3.12.
#
# GPU_CHECK_DIR is on the disk to measure (default: /var/tmp), GPU_CHECK_GIB the size of the checkpoint (default: 8).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tools/lib.sh
source tools/lib.sh

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

carried=$root/.gpu
site=$root/build/gpu/site
python=$(command -v python3)

fetch() {
  local version=$1 peer packages=(
    liburing2 liburing-dev libisal2 libisal-dev libgtest-dev libgmock-dev libcli11-dev libbenchmark-dev libbenchmark1debian pkgconf-bin libpkgconf3
  )
  local peers=("flashpack==$reference_version" fastsafetensors==0.5.0 instanttensor==0.2.2)
  rm -rf "$carried"
  mkdir -p "$carried/debs"
  (cd "$carried/debs" && apt-get -q download "${packages[@]}") || return
  for peer in "${peers[@]}"; do
    # Its name in device_bench.py: the reference has ours, and is told apart by its version.
    local name=${peer%%==*}
    [[ $name == flashpack ]] && name=flashpack-$reference_version
    "$python" -m pip install --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
      --target "$carried/packages/$name" "$peer" || echo "no wheel of $peer for Python $version: it will not be measured"
  done
  du -sh "$carried"
}

# What was carried serves where the machine itself has nothing.
use_carried() {
  local sysroot=$root/build/gpu/sysroot deb
  mkdir -p "$sysroot"
  for deb in "$carried"/debs/*.deb; do
    [[ -e $deb ]] && dpkg -x "$deb" "$sysroot"
  done
  local lib=$sysroot/usr/lib/x86_64-linux-gnu
  export CMAKE_PREFIX_PATH=$sysroot/usr${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}
  export PKG_CONFIG_PATH=$lib/pkgconfig LD_LIBRARY_PATH=$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  export CPLUS_INCLUDE_PATH=$sysroot/usr/include
  command -v pkg-config >/dev/null || {
    ln -sf pkgconf "$sysroot/usr/bin/pkg-config"
    export PATH=$PATH:$sysroot/usr/bin
  }
}

install_python_package() {
  rm -rf "$site"
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" .
}

measure() {
  local folder=${GPU_CHECK_DIR:-/var/tmp}/gpu_check.$$
  mkdir -p "$folder" "$1"
  "$python" tools/device_bench.py --dir "$folder" --size_gib "${GPU_CHECK_GIB:-8}" --out "$1/device_bench" \
    --packages "$carried/packages"
  local status=$?
  rm -rf "$folder"
  return "$status"
}

check() {
  local out=$1
  nvidia-smi -L 2>/dev/null || fail "no NVIDIA GPU here: nvidia-smi lists none"
  "$python" -c 'import torch; assert torch.cuda.is_available()' || fail "$python has no torch that sees the GPU"
  rm -rf "$results"
  mkdir -p "$results" "$out"
  use_carried
  command -v ccache >/dev/null || unset CMAKE_CXX_COMPILER_LAUNCHER
  export FLASHPACK_REQUIRE_GPU=1
  # Another compiler has other warnings.
  if step build release-build build_preset release -DFLASHPACK_WERROR=OFF; then
    step suite release ctest --preset release --parallel "$(nproc)" --no-tests=error --output-junit "$results/release.xml"
  fi
  if step build package install_python_package; then
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    step suite pytest "$python" -m pytest tests/python --junitxml="$results/pytest.xml"
    step check device_bench measure "$out" && cat "$out/device_bench.md"
  fi
  "$python" tools/tally.py "$results"
}

case ${1:-check} in
  check) check "${2:-gpu_check}" ;;
  fetch) [[ $# == 2 ]] || { usage >&2 && exit 2; } && fetch "$2" ;;
  -h | --help) usage ;;
  *) usage >&2 && exit 2 ;;
esac
