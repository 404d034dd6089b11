# CudaRuntime::cudart, the static CUDA runtime, which finds the driver when it is first used: a program that links it
# starts on machines without one. From a CUDA toolkit, else from the PyPI wheels in the environment of Python3_EXECUTABLE:
# nvidia-cuda-runtime-cu12 and nvidia-cuda-nvcc-cu12, or nvidia-cuda-runtime and nvidia-cuda-crt. Toolkits serve from
# 12.4 on, and wheels from 12.9 on, because older ones lack the static runtime.

# CMake 3.25 has an error for toolkits without nvToolsExt, as from 13 on, in projects that require CMake 3.25.
set(minimum_required ${CMAKE_MINIMUM_REQUIRED_VERSION})
set(CMAKE_MINIMUM_REQUIRED_VERSION 3.24)
find_package(CUDAToolkit 12.4 QUIET)
set(CMAKE_MINIMUM_REQUIRED_VERSION ${minimum_required})
if(TARGET CUDA::cudart_static)
  set(CudaRuntime_INCLUDE_DIR ${CUDAToolkit_INCLUDE_DIRS})
  set(CudaRuntime_CRT_INCLUDE_DIR ${CUDAToolkit_INCLUDE_DIRS})
  set(CudaRuntime_LIBRARY ${CUDA_cudart_static_LIBRARY})
  set(CudaRuntime_VERSION ${CUDAToolkit_VERSION})
else()
  set(cuda_wheels)
  if(Python3_EXECUTABLE)
    # Where packages of that name are, wherever an isolated build has them.
    execute_process(
      COMMAND ${Python3_EXECUTABLE} -c
              "import importlib.util as u; s = u.find_spec('nvidia'); print(';'.join(s.submodule_search_locations) if s else '')"
      OUTPUT_VARIABLE nvidia_packages OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    # Those of CUDA 12 first: they serve more drivers.
    foreach(name cuda_runtime cuda_nvcc nvtx cu13)
      list(TRANSFORM nvidia_packages APPEND /${name} OUTPUT_VARIABLE wheels)
      list(APPEND cuda_wheels ${wheels})
    endforeach()
  endif()
  # The wheels before the system's folders, and the headers where the library is: they have to be of one version.
  find_library(CudaRuntime_LIBRARY cudart_static HINTS ${cuda_wheels} PATH_SUFFIXES lib lib64)
  cmake_path(GET CudaRuntime_LIBRARY PARENT_PATH library_folder)
  find_path(CudaRuntime_INCLUDE_DIR cuda_runtime_api.h HINTS ${library_folder}/.. ${cuda_wheels} PATH_SUFFIXES include)
  find_path(CudaRuntime_CRT_INCLUDE_DIR crt/host_defines.h HINTS ${CudaRuntime_INCLUDE_DIR} ${library_folder}/.. ${cuda_wheels} PATH_SUFFIXES include)
  find_path(CudaRuntime_NVTX_INCLUDE_DIR nvtx3/nvToolsExt.h HINTS ${CudaRuntime_INCLUDE_DIR} ${cuda_wheels} PATH_SUFFIXES include)
  if(CudaRuntime_INCLUDE_DIR)
    file(STRINGS ${CudaRuntime_INCLUDE_DIR}/cuda_runtime_api.h version REGEX "define CUDART_VERSION +[0-9]+")
    string(REGEX REPLACE ".* ([0-9]+)0([0-9])0$" "\\1.\\2" CudaRuntime_VERSION "${version}")
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(CudaRuntime
  REQUIRED_VARS CudaRuntime_LIBRARY CudaRuntime_INCLUDE_DIR CudaRuntime_CRT_INCLUDE_DIR VERSION_VAR CudaRuntime_VERSION)
mark_as_advanced(CudaRuntime_LIBRARY CudaRuntime_INCLUDE_DIR CudaRuntime_CRT_INCLUDE_DIR CudaRuntime_NVTX_INCLUDE_DIR)

if(CudaRuntime_FOUND AND NOT TARGET CudaRuntime::cudart)
  find_package(Threads REQUIRED)
  add_library(CudaRuntime::cudart STATIC IMPORTED GLOBAL)
  set_target_properties(CudaRuntime::cudart PROPERTIES IMPORTED_LOCATION ${CudaRuntime_LIBRARY}
    VERSION ${CudaRuntime_VERSION})
  target_include_directories(CudaRuntime::cudart SYSTEM INTERFACE ${CudaRuntime_INCLUDE_DIR} ${CudaRuntime_CRT_INCLUDE_DIR})
  if(CudaRuntime_NVTX_INCLUDE_DIR)  # A toolkit has it among its other headers.
    target_include_directories(CudaRuntime::cudart SYSTEM INTERFACE ${CudaRuntime_NVTX_INCLUDE_DIR})
  endif()
  target_link_libraries(CudaRuntime::cudart INTERFACE Threads::Threads ${CMAKE_DL_LIBS} rt)
endif()
