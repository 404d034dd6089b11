# Finds LibTorch, from PyPI's torch wheel or unpacked from libtorch.zip.
#
# In, by order of preference:
#   LIBTORCH_ROOT       cache or environment variable: the directory that holds include/ and lib/
#   Python3_EXECUTABLE  the interpreter whose torch is taken; torch itself is not imported, which would take seconds
# Out:
#   LibTorch::cpu       imported target: torch_cpu and c10, their headers as system headers; programs start without the
#                       CUDA libraries, which libtorch.so would load
#   LibTorch_VERSION    as in "2.6.0"
#
# Torch's own package configuration is not used: it asks for a CUDA toolkit, and for a CUDA standard that CMake before
# 3.27 does not know, even where only CPU code is built.

set(LIBTORCH_ROOT "$ENV{LIBTORCH_ROOT}" CACHE PATH "LibTorch: the directory with include/ and lib/")
set(_libtorch_hint "${LIBTORCH_ROOT}")
if(NOT _libtorch_hint)
  find_package(Python3 QUIET COMPONENTS Interpreter)
  if(Python3_EXECUTABLE)
    execute_process(
      COMMAND "${Python3_EXECUTABLE}" -c
              "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
      OUTPUT_VARIABLE _libtorch_hint OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
endif()

if(_libtorch_hint)
  find_path(LibTorch_INCLUDE_DIR ATen/core/Tensor.h HINTS "${_libtorch_hint}/include" NO_DEFAULT_PATH)
  foreach(_library IN ITEMS torch_cpu c10)
    find_library(LibTorch_${_library}_LIBRARY ${_library} HINTS "${_libtorch_hint}/lib" NO_DEFAULT_PATH)
  endforeach()
endif()
mark_as_advanced(LibTorch_INCLUDE_DIR LibTorch_torch_cpu_LIBRARY LibTorch_c10_LIBRARY)

if(LibTorch_INCLUDE_DIR)
  # The wheel moved the version header in 2.9.
  foreach(_header IN ITEMS torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(NOT LibTorch_VERSION AND EXISTS "${LibTorch_INCLUDE_DIR}/${_header}")
      file(STRINGS "${LibTorch_INCLUDE_DIR}/${_header}" _version REGEX "^#define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
      string(REGEX REPLACE "[^0-9]+" ";" _version "${_version}")
      list(FILTER _version EXCLUDE REGEX "^$")
      list(JOIN _version "." LibTorch_VERSION)
    endif()
  endforeach()
endif()
if(LibTorch_c10_LIBRARY)
  # Wheels before 2.6 were built with the other std::string; c10::Error's constructor tells which one this is.
  file(STRINGS "${LibTorch_c10_LIBRARY}" LibTorch_CXX11_ABI LIMIT_COUNT 1
       REGEX "_ZN3c105ErrorC[12]E[^ ]*NSt7__cxx1112basic_string")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_INCLUDE_DIR LibTorch_torch_cpu_LIBRARY LibTorch_c10_LIBRARY LibTorch_CXX11_ABI
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "set Python3_EXECUTABLE to a Python that has torch, or LIBTORCH_ROOT to a LibTorch with the C++11 ABI, \
searched '${_libtorch_hint}'")

if(LibTorch_FOUND AND NOT TARGET LibTorch::cpu)
  add_library(LibTorch::c10 SHARED IMPORTED GLOBAL)
  set_target_properties(LibTorch::c10 PROPERTIES IMPORTED_LOCATION "${LibTorch_c10_LIBRARY}")
  add_library(LibTorch::torch_cpu SHARED IMPORTED GLOBAL)
  set_target_properties(LibTorch::torch_cpu PROPERTIES IMPORTED_LOCATION "${LibTorch_torch_cpu_LIBRARY}")

  add_library(LibTorch::cpu INTERFACE IMPORTED GLOBAL)
  target_include_directories(LibTorch::cpu SYSTEM INTERFACE
    "${LibTorch_INCLUDE_DIR}" "${LibTorch_INCLUDE_DIR}/torch/csrc/api/include")
  target_link_libraries(LibTorch::cpu INTERFACE LibTorch::torch_cpu LibTorch::c10)
endif()
