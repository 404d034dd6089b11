# shellcheck shell=bash
# What the scripts of this folder share. Sourced, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.cache/venv
python=$venv/bin/python
uv_version=0.13.9
# The PyPI package that this one takes the place of.
reference_version=0.4.5
reference_venv=$root/.cache/reference-venv
reference_python=$reference_venv/bin/python

# For every CMake below this shell, the one that builds the Python package included.
export CMAKE_GENERATOR=Ninja
export CMAKE_CXX_COMPILER_LAUNCHER=ccache
# ctest leaves LC_ALL set to nothing for the projects that it configures and builds: the cache would miss.
# Without the others it keeps nothing that is compiled with precompiled headers.
export CCACHE_SLOPPINESS=locale,pch_defines,time_macros
CMAKE_BUILD_PARALLEL_LEVEL=$(nproc)
export CMAKE_BUILD_PARALLEL_LEVEL

fail() {
  printf '%s\n' "$*" >&2
  exit 1
}

as_root() {
  if ((EUID == 0)); then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    fail "no root rights and no sudo for: $*"
  fi
}

# shellcheck disable=SC2120  # Some scripts have none to add.
# install_packages [NAME...]: of the Debian packages that every build needs, and of these, those that are not there yet.
install_packages() {
  local missing=() name
  local wanted=(
    g++ cmake ninja-build pkg-config ccache git ca-certificates python3 python3-venv python3-dev
    liburing-dev libisal-dev libboost1.81-dev libcli11-dev libgtest-dev libgmock-dev libbenchmark-dev "$@"
  )
  command -v dpkg-query >/dev/null || fail "not a Debian system; install by hand what serves as: ${wanted[*]}"
  for name in "${wanted[@]}"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || missing+=("$name")
  done
  ((${#missing[@]})) || return 0
  echo "installing ${missing[*]}"
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300)
  as_root "${apt[@]}" update
  as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
}

# pip_install ARGUMENTS...: into the virtual environment, with uv, which takes seconds where pip takes minutes.
pip_install() {
  UV_HTTP_TIMEOUT=300 "$python" -m uv pip install --quiet --python "$python" "$@" ||
    "$python" -m pip install --quiet "$@"
}

# Debian's own interpreter, because its headers and venv module come from the packages above, whatever else is on PATH.
make_venv() {
  if ! "$python" -c 'import sys' 2>/dev/null; then
    rm -rf "$venv"
    /usr/bin/python3 -m venv "$venv"
  fi
  "$python" -c 'import uv' 2>/dev/null || "$python" -m pip install --quiet "uv==$uv_version"
  pip_install -r "$root/tools/requirements.txt"
}

# The Python reference in an environment of its own: both are called flashpack. The large packages that it needs come
# from the other environment, which is behind its own on the path; the overrides keep them from being installed again.
make_reference_venv() {
  if ! "$reference_python" -c 'import sys' 2>/dev/null; then
    rm -rf "$reference_venv"
    /usr/bin/python3 -m venv --without-pip "$reference_venv"
  fi
  UV_HTTP_TIMEOUT=300 "$python" -m uv pip install --quiet --python "$reference_python" \
    --override <(printf "%s; sys_platform == 'none'\n" torch numpy tqdm safetensors) \
    "flashpack==$reference_version" accelerate==1.15.0 || return
  local where="import sysconfig; print(sysconfig.get_path('purelib'))"
  "$python" -c "$where" >"$("$reference_python" -c "$where")/packages_of_the_other.pth" || return
  "$reference_python" - "$reference_version" <<'EOF'
import sys, flashpack
assert flashpack.__version__ == sys.argv[1], (flashpack.__version__, flashpack.__file__)
EOF
}

# The headers of each runtime that tests/tools/cuda_versions_test.py compiles with. Without network there are none.
fetch_cuda_headers() {
  local version to
  for version in 12.4 12.8 12.9; do
    to=$root/.cache/cuda/$version
    [[ -d $to ]] && continue
    rm -rf "$to.part"
    pip_install --no-deps --target "$to.part" "nvidia-cuda-runtime-cu12==$version.*" "nvidia-cuda-nvcc-cu12==$version.*" || return
    rm -rf "$to.part"/nvidia/cuda_nvcc/{bin,nvvm}  # They take 95 MB of 100.
    mv "$to.part" "$to"
  done
}

# The Python package, built from this tree into the virtual environment, with the compiler's name and flags of the preset
# "release", so that a compiler cache has what that preset has built.
install_flashpack() {
  CXX=c++ pip_install --no-deps --force-reinstall --config-settings=cmake.define.FLASHPACK_WERROR=ON "$root"
}

# add_packages FOLDER NAME REQUIREMENT...: packages into FOLDER/NAME, for PYTHONPATH. torch and what is built for one
# version of it come from the virtual environment.
add_packages() {
  local folder=$1 name=$2 torch_and_its_own=(torch torchaudio torchcodec torchvision triton intel-openmp)
  shift 2
  [[ -d $folder/$name ]] && return
  rm -rf "$folder/$name.part"
  UV_HTTP_TIMEOUT=300 "$python" -m uv pip install --quiet --python "$python" --target "$folder/$name.part" \
    --override <(printf "%s; sys_platform == 'none'\n" "${torch_and_its_own[@]}") "$@" || return
  mv "$folder/$name.part" "$folder/$name"
}

# configure PRESET OPTIONS...
configure() {
  local preset=$1
  shift
  cmake -S "$root" --preset "$preset" -DPython3_EXECUTABLE="$python" "$@"
}

# Steps leave their logs and JUnit files here, for tally.py to count.
results=$root/.cache/test

# step KIND NAME COMMAND...: runs it without input, shows how it went, and notes it for the count. KIND says what success
# is worth: `build` nothing, `check` one test passed, `suite` what NAME.xml says.
step() {
  local kind=$1 name=$2 started=$SECONDS status
  shift 2
  ("$@") >"$results/$name.log" 2>&1 </dev/null
  status=$?
  printf '%s\t%s\t%s\n' "$kind" "$name" "$status" >>"$results/steps.tsv"
  printf '%-16s %-6s %4d s\n' "$name" "$([[ $status == 0 ]] && echo ok || echo FAILED)" $((SECONDS - started))
  [[ $status == 0 ]] || tail -n 60 "$results/$name.log" | sed 's/^/    /'
  return "$status"
}

build_preset() {
  configure "$@" && cmake --build --preset "$1"
}

# build_engine_bench: in the release build, with the options that it has been configured with.
build_engine_bench() {
  if [[ ! -f $root/build/release/CMakeCache.txt ]]; then
    echo "there is no release build: cmake --preset release" >&2
    return 1
  fi
  cmake --build "$root/build/release" --target engine_bench
}

# beside COMMAND...: in the background, as $!. It gets a process group of its own, because only so all that it starts can
# be ended.
beside() {
  set -m
  "$@" &
  set +m
}

# For the exit of a script that starts something beside it.
end_what_is_beside() {
  local group
  for group in $(jobs -pr); do kill -- "-$group" 2>/dev/null; done
}

at_leisure() {
  renice -n 19 "$BASHPID" >/dev/null
  "$@"
}

# The build of each preset that start_build has started.
declare -A builds=()

# start_build PRESET OPTIONS...: builds it with the time that the steps beside it leave, after the build that was started
# before.
start_build() {
  ((${#builds[@]})) && wait "${builds[@]}"
  beside step build "$1-build" at_leisure build_preset "$@"
  builds[$1]=$!
}

# ctest_preset PRESET: tests it, once the build that was started has succeeded. Many tests wait for a file system that
# hangs, so that more of them run at a time than there are cores. Programs with the label "whole" are left out: ctest
# would count each as one test.
ctest_preset() {
  wait "${builds[$1]}"
  grep -q "^build.$1-build.0$" "$results/steps.tsv" || return
  step suite "$1" ctest --preset "$1" --parallel "$(($(nproc) + 2))" --label-exclude '^whole$' --no-tests=error \
    --output-junit "$results/$1.xml"
}

# require_tests FOLDER FILE::TEST...: fails unless each test is there, because a test that was renamed would no longer be
# left out.
require_tests() {
  local tests=$1 test
  shift
  for test; do
    grep -q "^ *def ${test##*::}(" "$tests/${test%%::*}" || fail "there is no $test any more"
  done
}

# make_bare_root FOLDER PACKAGE,...: a root file system of Debian 12 with these packages and what they need.
make_bare_root() {
  rm -rf "$1"
  mkdir -p "$1"
  mmdebstrap --quiet --variant=minbase --include="$2" bookworm "$1" http://deb.debian.org/debian
}

# in_bare_root ROOT [FROM:TO...] -- COMMAND...: the command in that root file system, as its own root, without network and
# with processes of its own. Each FROM, a file or a folder, is there as TO, to be read only.
in_bare_root() {
  # shellcheck disable=SC2016
  unshare --net --mount --pid --fork --kill-child bash -c '
    bare=$1
    shift
    while [[ $1 != -- ]]; do
      from=${1%%:*} to=$bare${1#*:}
      if [[ -d $from ]]; then mkdir -p "$to"; else mkdir -p "${to%/*}" && touch "$to"; fi
      mount --bind "$from" "$to" && mount -o remount,bind,ro "$to" || exit
      shift
    done
    mount -t proc proc "$bare/proc" && mount -t tmpfs tmpfs "$bare/tmp" && mount --rbind /dev "$bare/dev" || exit
    ip link set lo up 2>/dev/null
    exec chroot "$bare" "${@:2}"
  ' bash "$@"
}
