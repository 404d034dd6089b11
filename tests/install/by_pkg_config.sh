#!/bin/sh
# Builds and runs one of the programs here by hand, as projects without CMake do.
#
# usage: by_pkg_config.sh PREFIX SOURCE FILE PACKAGES COMPILER FLAGS...   (FILE is what it loads; PACKAGES is one word)
set -eu
prefix=$1 source=$2 file=$3 packages=$4
shift 4
PKG_CONFIG_PATH=$(find "$prefix" -name pkgconfig)
LD_LIBRARY_PATH=$PKG_CONFIG_PATH/..
export PKG_CONFIG_PATH LD_LIBRARY_PATH
program=$(mktemp)
trap 'rm -f "$program"' EXIT
# shellcheck disable=SC2046  # They are several words.
"$@" -o "$program" "$source" $(pkg-config --cflags --libs "$packages")
"$program" "$file"
