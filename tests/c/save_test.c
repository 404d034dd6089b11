#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>

#include "tests/c/check.h"

enum { COUNT = 700000 };

static float* weights(void) {
  float* values = malloc(COUNT * sizeof *values);
  CHECK(values);
  for (int i = 0; i < COUNT; ++i) values[i] = (float)i;
  return values;
}

// A file with tensors "w" of COUNT floats, "empty" and "b" of 3 bytes.
static flashpack_checkpoint* saved(flashpack_engine* engine, const char* path, const float* values) {
  static const int64_t shape[] = {7, COUNT / 7}, none[] = {0}, three[] = {3};
  const flashpack_save_tensor tensors[] = {
      {.name = "b", .name_bytes = 1, .shape = three, .dims = 1, .data = "xyz", .dtype = FLASHPACK_DTYPE_UINT8},
      {.name = "empty", .name_bytes = 5, .shape = none, .dims = 1, .dtype = FLASHPACK_DTYPE_FLOAT32},
      {.name = "w", .name_bytes = 1, .shape = shape, .dims = 2, .data = values, .dtype = FLASHPACK_DTYPE_FLOAT32},
  };
  OK(flashpack_save(engine, path, tensors, 3, NULL, &error));
  flashpack_checkpoint* checkpoint = NULL;
  OK(flashpack_checkpoint_open(path, &checkpoint, &error));
  return checkpoint;
}

static void* data_of(const flashpack_checkpoint* checkpoint, const flashpack_tensors* tensors, const char* name) {
  size_t index = 0;
  void* data = NULL;
  OK(flashpack_checkpoint_find(checkpoint, name, strlen(name), &index, &error));
  OK(flashpack_tensors_data(tensors, index, &data, &error));
  return data;
}

TEST(saved_tensors_are_loaded_with_one_call) {
  flashpack_engine* engine = new_engine();
  float* values = weights();
  flashpack_checkpoint* checkpoint = saved(engine, in_folder("model.flashpack"), values);
  flashpack_load_request request = {sizeof request};
  request.checkpoint = checkpoint;
  request.verify = FLASHPACK_VERIFY_ALWAYS;
  flashpack_tensors* tensors = NULL;
  OK(flashpack_load_all(engine, &request, &tensors, &error));
  float* loaded = data_of(checkpoint, tensors, "w");
  CHECK((size_t)loaded % sizeof *loaded == 0 && memcmp(loaded, values, COUNT * sizeof *values) == 0);
  CHECK(memcmp(data_of(checkpoint, tensors, "b"), "xyz", 3) == 0 && !data_of(checkpoint, tensors, "empty"));
  loaded[0] = 1;
  void* data = NULL;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "no tensor 3", flashpack_tensors_data(tensors, 3, &data, &error));
  flashpack_tensors_destroy(tensors);
  flashpack_checkpoint_destroy(checkpoint);
  flashpack_engine_destroy(engine);
  free(values);
}

TEST(a_load_of_all_tensors_outlives_the_handles_of_its_parts) {
  flashpack_engine* engine = new_engine();
  float* values = weights();
  const char* path = in_folder("model.flashpack");
  flashpack_checkpoint_destroy(saved(engine, path, values));
  for (int i = 0; i < 20; ++i) {
    flashpack_checkpoint* checkpoint = NULL;
    OK(flashpack_checkpoint_open(path, &checkpoint, &error));
    flashpack_load_request request = {sizeof request};
    request.checkpoint = checkpoint;
    flashpack_tensors* tensors = NULL;
    flashpack_transfer* transfer = NULL;
    OK(flashpack_start_load_all(engine, &request, &tensors, &transfer, &error));
    flashpack_checkpoint_destroy(checkpoint);
    flashpack_tensors_destroy(tensors);
    OK(flashpack_transfer_wait(transfer, &error));
    flashpack_transfer_destroy(transfer);
  }
  flashpack_engine_destroy(engine);
  free(values);
}

TEST(a_byte_that_is_wrong_is_found) {
  flashpack_engine* engine = new_engine();
  float* values = weights();
  const char* path = in_folder("model.flashpack");
  flashpack_checkpoint* checkpoint = saved(engine, path, values);
  flashpack_verify_report report = {sizeof report};
  OK(flashpack_verify(engine, checkpoint, 0, &report, &error));
  CHECK(report.verified_bytes >= COUNT * sizeof *values && report.corrupt_stripes == 0);
  CHECK(report.corrupt_offset_bytes == FLASHPACK_NO_OFFSET);
  flashpack_checkpoint_destroy(checkpoint);

  const int fd = open(path, O_WRONLY);
  CHECK(fd >= 0 && pwrite(fd, "?", 1, (1 << 20) + 5) == 1 && close(fd) == 0);
  OK(flashpack_checkpoint_open(path, &checkpoint, &error));
  FAILS(FLASHPACK_CORRUPT, "where \"w\" lies", flashpack_verify(engine, checkpoint, 0, &report, &error));
  CHECK(report.corrupt_stripes == 1 && report.corrupt_offset_bytes == 1 << 20);
  FAILS(FLASHPACK_CORRUPT, "where \"w\" lies", flashpack_verify(engine, checkpoint, 0, NULL, &error));
  flashpack_load_request request = {sizeof request};
  request.checkpoint = checkpoint;
  flashpack_tensors* tensors = (flashpack_tensors*)&tensors;
  FAILS(FLASHPACK_CORRUPT, "where \"w\" lies", flashpack_load_all(engine, &request, &tensors, &error));
  CHECK(!tensors);
  request.verify = FLASHPACK_VERIFY_NEVER;
  OK(flashpack_load_all(engine, &request, &tensors, &error));
  flashpack_tensors_destroy(tensors);
  flashpack_checkpoint_destroy(checkpoint);
  flashpack_engine_destroy(engine);
  free(values);
}

TEST(extents_of_a_checkpoint_are_read_from_the_file_that_was_opened) {
  flashpack_engine* engine = new_engine();
  float* values = weights();
  const char* path = in_folder("model.flashpack");
  flashpack_checkpoint* checkpoint = saved(engine, path, values);
  CHECK(unlink(path) == 0);
  flashpack_tensor tensor = {sizeof tensor};
  size_t index = 0;
  OK(flashpack_checkpoint_find(checkpoint, "b", 1, &index, &error));
  OK(flashpack_checkpoint_get_tensor(checkpoint, index, &tensor, &error));
  char target[4] = "";
  const flashpack_extent extent = {.file = (uint32_t)tensor.file,
                                   .offset_bytes = tensor.offset_bytes,
                                   .size_bytes = tensor.size_bytes,
                                   .target = target};
  flashpack_load_request request = {sizeof request};
  request.checkpoint = checkpoint;
  request.extents = &extent;
  request.extent_count = 1;
  OK(flashpack_load(engine, &request, &error));
  CHECK(strcmp(target, "xyz") == 0);
  request.verify = FLASHPACK_VERIFY_ALWAYS;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "could be held against", flashpack_load(engine, &request, &error));
  request.paths = &path;
  request.path_count = 1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "a checkpoint, and paths", flashpack_load(engine, &request, &error));
  flashpack_tensors* tensors = NULL;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "has paths", flashpack_load_all(engine, &request, &tensors, &error));
  flashpack_checkpoint_destroy(checkpoint);
  flashpack_engine_destroy(engine);
  free(values);
}

TEST(what_cannot_be_saved_is_refused_and_leaves_no_file) {
  flashpack_engine* engine = new_engine();
  const char* path = in_folder("model.flashpack");
  const int64_t shape[] = {-1};
  flashpack_save_tensor tensors[] = {{.name = "a", .name_bytes = 1, .data = "1", .dtype = FLASHPACK_DTYPE_UINT8},
                                     {.name = "a", .name_bytes = 1, .data = "2", .dtype = FLASHPACK_DTYPE_UINT8}};
  FAILS(FLASHPACK_INVALID_ARGUMENT, "", flashpack_save(engine, path, tensors, 2, NULL, &error));
  FAILS(FLASHPACK_INVALID_ARGUMENT, "No tensors", flashpack_save(engine, path, NULL, 0, NULL, &error));
  tensors[0].dtype = 22;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "no value 22", flashpack_save(engine, path, tensors, 1, NULL, &error));
  tensors[0].dtype = FLASHPACK_DTYPE_INT8;
  tensors[0].dims = 1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "shape", flashpack_save(engine, path, tensors, 1, NULL, &error));
  tensors[0].shape = shape;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "", flashpack_save(engine, path, tensors, 1, NULL, &error));
  tensors[0].dims = 0;
  tensors[0].data = NULL;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "", flashpack_save(engine, path, tensors, 1, NULL, &error));
  FAILS(ENOENT, "/no/such", flashpack_save(engine, "/no/such/file", tensors + 1, 1, NULL, &error));
  CHECK(access(path, F_OK) != 0);
  flashpack_engine_destroy(engine);
}

static void check_content(const char* path, const char* expected) {
  char found[64] = "";
  FILE* file = fopen(path, "rb");
  CHECK(file && fread(found, 1, sizeof found, file) == strlen(expected) && fclose(file) == 0);
  CHECK(strcmp(found, expected) == 0);
}

TEST(a_file_is_as_before_until_the_writer_commits) {
  flashpack_engine* engine = new_engine();
  const char* path = in_folder("file");
  for (int commits = 1; commits >= 0; --commits) {
    flashpack_writer* writer = NULL;
    OK(flashpack_writer_create(engine, path, NULL, &writer, &error));
    const char* text = commits ? "first" : "other";
    const flashpack_source source = {.size_bytes = 5, .source = text};
    flashpack_write_request request = {sizeof request};
    request.sources = &source;
    request.source_count = 1;
    flashpack_transfer* transfer = NULL;
    OK(flashpack_start_write(writer, &request, &transfer, &error));
    OK(flashpack_transfer_wait(transfer, &error));
    flashpack_transfer_destroy(transfer);
    FAILS(FLASHPACK_INVALID_ARGUMENT, "twice", flashpack_write(writer, &request, &error));
    if (commits) {
      OK(flashpack_writer_commit(writer, " tail", 5, &error));
      FAILS(FLASHPACK_INVALID_ARGUMENT, "commit", flashpack_writer_commit(writer, NULL, 0, &error));
      FAILS(FLASHPACK_INVALID_ARGUMENT, "commit", flashpack_write(writer, &request, &error));
    }
    flashpack_writer_destroy(writer);
    check_content(path, "first tail");
  }
  flashpack_engine_destroy(engine);
}

TEST(a_writer_keeps_its_engine) {
  flashpack_engine* engine = new_engine();
  const char* path = in_folder("file");
  flashpack_writer* writer = NULL;
  OK(flashpack_writer_create(engine, path, NULL, &writer, &error));
  flashpack_engine_destroy(engine);
  const flashpack_source source = {.size_bytes = 5, .source = "bytes"};
  flashpack_write_request request = {sizeof request};
  request.sources = &source;
  request.source_count = 1;
  flashpack_transfer* transfer = NULL;
  OK(flashpack_start_write(writer, &request, &transfer, &error));
  OK(flashpack_transfer_wait(transfer, &error));
  OK(flashpack_writer_commit(writer, NULL, 0, &error));
  flashpack_writer_destroy(writer);
  OK(flashpack_transfer_wait(transfer, &error));
  flashpack_transfer_destroy(transfer);
  check_content(path, "bytes");
}
