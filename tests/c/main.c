#define _XOPEN_SOURCE 700
#include <errno.h>
#include <limits.h>

#include "tests/c/check.h"

static test_case* first;
static char folder[] = "/var/tmp/flashpack-test-XXXXXX";
static char paths[8][PATH_MAX];
static size_t path_count;

void add_test(test_case* added) {
  added->next = first;
  first = added;
}

static void remove_folder(void) {
  for (size_t i = 0; i < path_count; ++i) unlink(paths[i]);
  rmdir(folder);
}

const char* in_folder(const char* name) {
  CHECK(path_count < 8);
  char* path = paths[path_count++];
  CHECK(snprintf(path, PATH_MAX, "%s/%s", folder, name) < PATH_MAX);
  return path;
}

unsigned char byte_at(size_t i) { return (unsigned char)(i * 7 + (i >> 9)); }

const char* make_file(const char* name, size_t size) {
  const char* path = in_folder(name);
  unsigned char* bytes = malloc(size);
  CHECK(bytes);
  for (size_t i = 0; i < size; ++i) bytes[i] = byte_at(i);
  FILE* file = fopen(path, "wb");
  CHECK(file && fwrite(bytes, 1, size, file) == size && fclose(file) == 0);
  free(bytes);
  return path;
}

flashpack_engine* new_engine(void) {
  flashpack_engine_options options = {sizeof options};
  options.workers = 2;
  flashpack_engine* engine = NULL;
  OK(flashpack_engine_create(&options, &engine, &error));
  return engine;
}

int main(int argc, char** argv) {
  if (!mkdtemp(folder)) return 2;
  atexit(remove_folder);
  for (test_case* one = first; one; one = one->next) {
    if (argc == 2 && strcmp(argv[1], one->name) == 0) {
      one->run();
      return 0;
    }
  }
  fprintf(stderr, "there is no such test\n");
  return 2;
}
