/// A few tests in C: TEST(name) { CHECK(...); } in any number of files, and the name of one as the program's argument.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "flashpack/flashpack.h"

typedef struct test_case {
  const char* name;
  void (*run)(void);
  struct test_case* next;
} test_case;

void add_test(test_case* added);

#define TEST(name)                                                                      \
  static void test_##name(void);                                                        \
  static test_case case_##name = {#name, test_##name, NULL};                            \
  __attribute__((constructor)) static void add_##name(void) { add_test(&case_##name); } \
  static void test_##name(void)

/// The exit status of a test that cannot run here.
enum { SKIPPED = 77 };

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                                \
    }                                                                         \
  } while (0)

/// Calls a function whose last argument is &error, and which must succeed.
#define OK(call)                                                                                     \
  do {                                                                                               \
    flashpack_error* error = NULL;                                                                   \
    const flashpack_status status = (call);                                                          \
    if (status != FLASHPACK_OK || error) {                                                           \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, flashpack_error_message(error)); \
      exit(1);                                                                                       \
    }                                                                                                \
  } while (0)

/// Calls one that must fail with `expected`, and whose message must have `text` in it.
#define FAILS(expected, text, call)                                                                                   \
  do {                                                                                                                \
    flashpack_error* error = NULL;                                                                                    \
    const flashpack_status status = (call);                                                                           \
    if (status != (expected) || flashpack_error_status(error) != status ||                                            \
        !strstr(flashpack_error_message(error), text)) {                                                              \
      fprintf(stderr, "%s:%d: %s: %d, %s\n", __FILE__, __LINE__, #call, (int)status, flashpack_error_message(error)); \
      exit(1);                                                                                                        \
    }                                                                                                                 \
    flashpack_error_destroy(error);                                                                                   \
  } while (0)

/// A folder that is removed, with the files that have been named in it, when the program ends.
const char* in_folder(const char* name);

/// Makes a file of `size` bytes, of which byte i is byte_at(i).
const char* make_file(const char* name, size_t size);
unsigned char byte_at(size_t i);

flashpack_engine* new_engine(void);
