# The files of pkg-config, for projects without CMake. They name places by where they are themselves, so that an
# installation can be moved.
set(pc_prefix ${CMAKE_INSTALL_PREFIX})
set(pc_libdir ${CMAKE_INSTALL_FULL_LIBDIR})
set(pc_includedir ${CMAKE_INSTALL_FULL_INCLUDEDIR})
if(NOT IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}" AND NOT IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
  file(RELATIVE_PATH up /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
  string(REGEX REPLACE "/$" "" up "${up}")
  set(pc_prefix "\${pcfiledir}/${up}")
  set(pc_libdir "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
  set(pc_includedir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()

# flashpack_install_pc(NAME DESCRIPTION LIBS [REQUIRES [CFLAGS]])
function(flashpack_install_pc pc_name pc_description pc_libs)
  set(pc_requires "${ARGV3}")
  set(pc_cflags "${ARGV4}")
  configure_file(${PROJECT_SOURCE_DIR}/engine/cmake/flashpack.pc.in ${PROJECT_BINARY_DIR}/${pc_name}.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/${pc_name}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endfunction()

# Archives leave their own libraries to the program, so that these are required, and not only of static programs.
set(archives_of_engine "-lflashpack_engine -pthread")
if(TARGET CudaRuntime::cudart)
  get_target_property(cudart CudaRuntime::cudart IMPORTED_LOCATION)
  string(APPEND archives_of_engine " ${cudart} -ldl -lrt")
endif()
flashpack_install_pc(flashpack-engine "The engine of flashpack, for C++20" "${archives_of_engine}"
  "liburing >= 2.3, libisal >= 2.30" -pthread)
if(TARGET flashpack_tuning)
  flashpack_install_pc(flashpack-tuning "The options that flashpack_tune found for a disk, for C++20"
    "-lflashpack_tuning -lflashpack_json" "flashpack-engine = ${PROJECT_VERSION}")
endif()
if(TARGET flashpack_format)
  flashpack_install_pc(flashpack-format "The file formats of flashpack, for C++20" "-lflashpack_format -lflashpack_json"
    "flashpack-engine = ${PROJECT_VERSION}")
endif()
if(TARGET flashpack_c)
  flashpack_install_pc(flashpack "The C API of flashpack" -lflashpack)
endif()
