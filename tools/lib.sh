# shellcheck shell=bash
# What quickstart.sh and test.sh share: installing what is missing. Sourced, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.cache/venv
python=$venv/bin/python
uv_version=0.13.9

# For every CMake below this shell, the one that builds the Python package included.
export CMAKE_GENERATOR=Ninja
export CMAKE_CXX_COMPILER_LAUNCHER=ccache
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

# install_packages [NAME...]: of the Debian packages that every build needs, and of these, those that are not there yet.
install_packages() {
  local missing=() name
  local wanted=(
    g++ cmake ninja-build pkg-config ccache git ca-certificates python3 python3-venv python3-dev
    liburing-dev libboost1.81-dev libcli11-dev libgtest-dev libgmock-dev libbenchmark-dev "$@"
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

# The Python package, built from this tree into the virtual environment.
install_flashpack() {
  pip_install --no-deps --force-reinstall "$root"
}

# configure PRESET OPTIONS...
configure() {
  local preset=$1
  shift
  cmake -S "$root" --preset "$preset" -DPython3_EXECUTABLE="$python" "$@"
}
