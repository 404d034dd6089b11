#include <errno.h>

#include "tests/c/check.h"

static flashpack_checkpoint* open_golden(const char* name) {
  char path[4096];
  CHECK(snprintf(path, sizeof path, "%s/%s.flashpack", FLASHPACK_GOLDEN_DIR, name) < (int)sizeof path);
  flashpack_checkpoint* checkpoint = NULL;
  OK(flashpack_checkpoint_open(path, &checkpoint, &error));
  return checkpoint;
}

TEST(a_checkpoint_lists_its_files_and_tensors) {
  flashpack_checkpoint* checkpoint = open_golden("v3_bf16");
  flashpack_checkpoint_info info = {sizeof info};
  OK(flashpack_checkpoint_get_info(checkpoint, &info, &error));
  CHECK(info.file_count == 1 && info.tensor_count == 2 && info.metadata_count == 0);
  flashpack_file file = {sizeof file};
  OK(flashpack_checkpoint_get_file(checkpoint, 0, &file, &error));
  CHECK(strcmp(strrchr(file.path, '/'), "/v3_bf16.flashpack") == 0 && strcmp(file.format, "flashpack") == 0);
  CHECK(file.fd >= 0 && !file.has_checksums && file.payload_bytes < file.size_bytes);
  flashpack_tensor tensor = {sizeof tensor};
  OK(flashpack_checkpoint_get_tensor(checkpoint, 1, &tensor, &error));
  CHECK(strcmp(tensor.name, "b") == 0 && tensor.name_bytes == 1 && strcmp(tensor.dtype_name, "bfloat16") == 0);
  CHECK(tensor.dtype == FLASHPACK_DTYPE_BFLOAT16 && tensor.element_bytes == 2 && tensor.file == 0);
  CHECK(tensor.dims == 1 && tensor.shape[0] == 1 && tensor.offset_bytes == 128 && tensor.size_bytes == 2);
  flashpack_checkpoint_destroy(checkpoint);
}

TEST(a_tensor_is_found_by_its_name) {
  flashpack_checkpoint* checkpoint = open_golden("v3_name_order");
  size_t index = 9;
  OK(flashpack_checkpoint_find(checkpoint, "a", 1, &index, &error));
  CHECK(index == 1);
  FAILS(FLASHPACK_NOT_FOUND, "no tensor \"ab\"", flashpack_checkpoint_find(checkpoint, "abc", 2, &index, &error));
  FAILS(FLASHPACK_NOT_FOUND, "no tensor", flashpack_checkpoint_find(checkpoint, NULL, 0, &index, &error));
  flashpack_checkpoint_destroy(checkpoint);
}

TEST(a_name_may_hold_a_zero_byte) {
  flashpack_engine* engine = new_engine();
  const char* path = in_folder("zero.flashpack");
  const unsigned char value = 5;
  const flashpack_save_tensor saved = {.name = "a\0b", .name_bytes = 3, .data = &value, .dtype = FLASHPACK_DTYPE_UINT8};
  OK(flashpack_save(engine, path, &saved, 1, NULL, &error));
  flashpack_checkpoint* checkpoint = NULL;
  OK(flashpack_checkpoint_open(path, &checkpoint, &error));
  flashpack_tensor tensor = {sizeof tensor};
  OK(flashpack_checkpoint_get_tensor(checkpoint, 0, &tensor, &error));
  CHECK(tensor.name_bytes == 3 && memcmp(tensor.name, "a\0b", 4) == 0 && tensor.dims == 0 && tensor.shape);
  CHECK(tensor.size_bytes == 1);
  size_t index = 9;
  OK(flashpack_checkpoint_find(checkpoint, "a\0b", 3, &index, &error));
  CHECK(index == 0);
  flashpack_checkpoint_destroy(checkpoint);
  flashpack_engine_destroy(engine);
}

TEST(text_of_the_author_is_listed) {
  static const char header[] =
      "{\"__metadata__\":{\"format\":\"pt\",\"b\":\"2\"},\"x\":{\"dtype\":\"U8\",\"shape\":[2],"
      "\"data_offsets\":[0,2]}}";
  const char* path = in_folder("text.safetensors");
  FILE* file = fopen(path, "wb");
  const unsigned char length[8] = {sizeof header - 1};
  CHECK(file && fwrite(length, 1, 8, file) == 8 && fputs(header, file) >= 0 && fputs("xy", file) >= 0);
  CHECK(fclose(file) == 0);
  flashpack_checkpoint* checkpoint = NULL;
  OK(flashpack_checkpoint_open(path, &checkpoint, &error));
  flashpack_checkpoint_info info = {sizeof info};
  OK(flashpack_checkpoint_get_info(checkpoint, &info, &error));
  CHECK(info.metadata_count == 2);
  flashpack_metadata entry = {sizeof entry};
  OK(flashpack_checkpoint_get_metadata(checkpoint, 1, &entry, &error));
  CHECK(strcmp(entry.key, "format") == 0 && entry.key_bytes == 6);
  CHECK(strcmp(entry.value, "pt") == 0 && entry.value_bytes == 2);
  flashpack_checkpoint_destroy(checkpoint);
}

TEST(several_files_are_one_checkpoint) {
  const char* const paths[] = {FLASHPACK_GOLDEN_DIR "/v3_bf16.flashpack", FLASHPACK_GOLDEN_DIR "/v3_bool.flashpack"};
  flashpack_checkpoint* checkpoint = NULL;
  OK(flashpack_checkpoint_open_files(paths, 2, &checkpoint, &error));
  flashpack_tensor tensor = {sizeof tensor};
  OK(flashpack_checkpoint_get_tensor(checkpoint, 2, &tensor, &error));
  CHECK(tensor.file == 1 && strcmp(tensor.name, "m") == 0);
  flashpack_checkpoint_destroy(checkpoint);
  const char* const twice[] = {paths[0], paths[0]};
  FAILS(FLASHPACK_BAD_FILE, "v3_bf16", flashpack_checkpoint_open_files(twice, 2, &checkpoint, &error));
  CHECK(!checkpoint);
}

TEST(a_file_that_cannot_be_opened_is_named_in_the_error) {
  flashpack_checkpoint* checkpoint = (flashpack_checkpoint*)&checkpoint;
  flashpack_error* error = NULL;
  CHECK(flashpack_checkpoint_open("/no/such/file", &checkpoint, &error) == ENOENT);
  CHECK(!checkpoint && error && flashpack_error_status(error) == ENOENT);
  CHECK(strcmp(flashpack_error_path(error), "/no/such/file") == 0);
  CHECK(flashpack_error_offset(error) == FLASHPACK_NO_OFFSET);
  CHECK(strstr(flashpack_error_message(error), "/no/such/file: No such file or directory"));
  flashpack_error_destroy(error);
  const char* path = make_file("not.flashpack", 100);
  FAILS(FLASHPACK_BAD_FILE, path, flashpack_checkpoint_open(path, &checkpoint, &error));
  FAILS(FLASHPACK_INVALID_ARGUMENT, "path is NULL", flashpack_checkpoint_open(NULL, &checkpoint, &error));
}

TEST(an_index_that_is_too_large_is_refused) {
  flashpack_checkpoint* checkpoint = open_golden("v3_bool");
  flashpack_tensor tensor = {sizeof tensor};
  flashpack_file file = {sizeof file};
  flashpack_metadata entry = {sizeof entry};
  FAILS(FLASHPACK_INVALID_ARGUMENT, "no tensor 1", flashpack_checkpoint_get_tensor(checkpoint, 1, &tensor, &error));
  FAILS(FLASHPACK_INVALID_ARGUMENT, "no file 1", flashpack_checkpoint_get_file(checkpoint, 1, &file, &error));
  FAILS(FLASHPACK_INVALID_ARGUMENT, "no entry", flashpack_checkpoint_get_metadata(checkpoint, 0, &entry, &error));
  flashpack_checkpoint_destroy(checkpoint);
}
