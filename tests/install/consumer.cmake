# consumer(SOURCE LIBRARIES...): a program, and a test that it loads a file.
function(consumer source)
  string(MAKE_C_IDENTIFIER ${source} name)
  add_executable(${name} ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/${source})
  target_link_libraries(${name} PRIVATE ${ARGN})
  add_test(NAME ${name} COMMAND ${name} ${FLASHPACK_FILE})
  set_tests_properties(${name} PROPERTIES PASS_REGULAR_EXPRESSION "loaded [1-9][0-9]* bytes")
endfunction()
