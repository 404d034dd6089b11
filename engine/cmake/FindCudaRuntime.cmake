# CudaRuntime::cudart, the static CUDA runtime, which finds the driver when it is first used: a program that links it
# starts on machines without one. From a CUDA toolkit, else from the PyPI wheels nvidia-cuda-runtime and nvidia-cuda-crt
# in the environment of Python3_EXECUTABLE.

# CMake 3.25 has an error for toolkits without nvToolsExt, as from 13 on, in projects that require CMake 3.25.
set(minimum_required ${CMAKE_MINIMUM_REQUIRED_VERSION})
set(CMAKE_MINIMUM_REQUIRED_VERSION 3.24)
find_package(CUDAToolkit 12 QUIET)
set(CMAKE_MINIMUM_REQUIRED_VERSION ${minimum_required})
if(TARGET CUDA::cudart_static)
  set(CudaRuntime_INCLUDE_DIR ${CUDAToolkit_INCLUDE_DIRS})
  set(CudaRuntime_LIBRARY ${CUDA_cudart_static_LIBRARY})
else()
  set(cuda_wheels)
  if(Python3_EXECUTABLE)
    # Where packages of that name are, wherever an isolated build has them.
    execute_process(
      COMMAND ${Python3_EXECUTABLE} -c
              "import importlib.util as u; s = u.find_spec('nvidia'); print(';'.join(s.submodule_search_locations) if s else '')"
      OUTPUT_VARIABLE nvidia_packages OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    foreach(package IN LISTS nvidia_packages)
      list(APPEND cuda_wheels ${package}/cu13 ${package}/cuda_runtime ${package}/cuda_nvcc)
    endforeach()
  endif()
  # The wheels before the system's folders: headers and library have to be of one version.
  find_path(CudaRuntime_INCLUDE_DIR cuda_runtime_api.h HINTS ${cuda_wheels} PATH_SUFFIXES include)
  find_library(CudaRuntime_LIBRARY cudart_static HINTS ${cuda_wheels} PATH_SUFFIXES lib lib64)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(CudaRuntime REQUIRED_VARS CudaRuntime_LIBRARY CudaRuntime_INCLUDE_DIR)
mark_as_advanced(CudaRuntime_LIBRARY CudaRuntime_INCLUDE_DIR)

if(CudaRuntime_FOUND AND NOT TARGET CudaRuntime::cudart)
  find_package(Threads REQUIRED)
  add_library(CudaRuntime::cudart STATIC IMPORTED GLOBAL)
  set_target_properties(CudaRuntime::cudart PROPERTIES IMPORTED_LOCATION ${CudaRuntime_LIBRARY})
  target_include_directories(CudaRuntime::cudart SYSTEM INTERFACE ${CudaRuntime_INCLUDE_DIR})
  target_link_libraries(CudaRuntime::cudart INTERFACE Threads::Threads ${CMAKE_DL_LIBS} rt)
endif()
