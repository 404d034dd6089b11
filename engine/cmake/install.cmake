# `cmake --install` lays down the libraries, public headers, and packages for find_package(flashpack) and pkg-config.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flashpack)

install(TARGETS flashpack_engine EXPORT flashpackTargets FILE_SET HEADERS)
if(TARGET flashpack_tuning)
  install(TARGETS flashpack_json flashpack_tuning EXPORT flashpackTargets FILE_SET HEADERS)
endif()
if(TARGET flashpack_format)
  install(TARGETS flashpack_format EXPORT flashpackTargets FILE_SET HEADERS)
endif()
install(EXPORT flashpackTargets NAMESPACE flashpack:: DESTINATION ${package_dir})

if(TARGET CudaRuntime::cudart)
  install(FILES ${CMAKE_CURRENT_LIST_DIR}/FindCudaRuntime.cmake DESTINATION ${package_dir})
endif()

# Sets of their own, so that a project without Boost or LibTorch can use the rest, and one in C the C API alone.
if(TARGET flashpack_c)
  install(TARGETS flashpack_c EXPORT flashpackCTargets FILE_SET HEADERS)
  install(EXPORT flashpackCTargets NAMESPACE flashpack:: DESTINATION ${package_dir})
endif()
if(TARGET flashpack_async)
  install(TARGETS flashpack_async EXPORT flashpackAsyncTargets FILE_SET HEADERS)
  install(EXPORT flashpackAsyncTargets NAMESPACE flashpack:: DESTINATION ${package_dir})
endif()
if(TARGET flashpack_torch)
  install(TARGETS flashpack_torch EXPORT flashpackTorchTargets FILE_SET HEADERS)
  install(EXPORT flashpackTorchTargets NAMESPACE flashpack:: DESTINATION ${package_dir})
  install(FILES ${PROJECT_SOURCE_DIR}/torch_binding/libtorch/cmake/FindLibTorch.cmake DESTINATION ${package_dir})
endif()

include(${CMAKE_CURRENT_LIST_DIR}/pkg_config.cmake)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/flashpackConfig.cmake.in
  ${PROJECT_BINARY_DIR}/flashpackConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/flashpackConfigVersion.cmake COMPATIBILITY SameMajorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flashpackConfig.cmake ${PROJECT_BINARY_DIR}/flashpackConfigVersion.cmake
  DESTINATION ${package_dir})
