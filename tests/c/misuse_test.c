#define _GNU_SOURCE
#include <errno.h>
#include <sys/wait.h>

#include "tests/c/check.h"
#include "tests/support/sanitizers.h"

TEST(null_is_destroyed_without_harm) {
  flashpack_error_destroy(NULL);
  flashpack_engine_destroy(NULL);
  flashpack_checkpoint_destroy(NULL);
  flashpack_memory_destroy(NULL);
  flashpack_tensors_destroy(NULL);
  flashpack_transfer_destroy(NULL);
  flashpack_writer_destroy(NULL);
  flashpack_events_destroy(NULL);
  flashpack_open_file_destroy(NULL);
  CHECK(flashpack_events_fd(NULL) == -1);
  CHECK(flashpack_error_status(NULL) == FLASHPACK_OK && flashpack_error_offset(NULL) == FLASHPACK_NO_OFFSET);
  CHECK(*flashpack_error_message(NULL) == 0 && *flashpack_error_path(NULL) == 0);
}

#define NULL_IS_REFUSED(name, call) FAILS(FLASHPACK_INVALID_ARGUMENT, name " is NULL", call)

TEST(null_handles_and_places_are_refused) {
  flashpack_engine* engine = new_engine();
  flashpack_checkpoint* checkpoint = NULL;
  flashpack_open_file* file = NULL;
  flashpack_memory* memory = NULL;
  flashpack_transfer* transfer = NULL;
  flashpack_tensors* tensors = NULL;
  flashpack_writer* writer = NULL;
  flashpack_load_request load = {sizeof load};
  flashpack_write_request write = {sizeof write};
  void* data = NULL;
  size_t index = 0;
  NULL_IS_REFUSED("engine", flashpack_engine_create(NULL, NULL, &error));
  NULL_IS_REFUSED("engine", flashpack_engine_get_info(NULL, NULL, &error));
  NULL_IS_REFUSED("info", flashpack_engine_get_info(engine, NULL, &error));
  NULL_IS_REFUSED("checkpoint", flashpack_checkpoint_open("x", NULL, &error));
  NULL_IS_REFUSED("paths", flashpack_checkpoint_open_files(NULL, 1, &checkpoint, &error));
  FAILS(FLASHPACK_INVALID_ARGUMENT, "path_count is 0", flashpack_checkpoint_open_files(NULL, 0, &checkpoint, &error));
  NULL_IS_REFUSED("checkpoint", flashpack_checkpoint_get_info(NULL, NULL, &error));
  NULL_IS_REFUSED("checkpoint", flashpack_checkpoint_get_file(NULL, 0, NULL, &error));
  NULL_IS_REFUSED("checkpoint", flashpack_checkpoint_get_tensor(NULL, 0, NULL, &error));
  NULL_IS_REFUSED("checkpoint", flashpack_checkpoint_get_metadata(NULL, 0, NULL, &error));
  NULL_IS_REFUSED("checkpoint", flashpack_checkpoint_find(NULL, "x", 1, &index, &error));
  NULL_IS_REFUSED("file", flashpack_open_file_open(engine, "x", -1, NULL, &error));
  NULL_IS_REFUSED("path", flashpack_open_file_open(engine, NULL, -1, &file, &error));
  NULL_IS_REFUSED("engine", flashpack_open_file_open(NULL, "x", -1, &file, &error));
  NULL_IS_REFUSED("file", flashpack_open_file_get_info(NULL, NULL, &error));
  NULL_IS_REFUSED("file", flashpack_open_file_check(NULL, &error));
  NULL_IS_REFUSED("memory", flashpack_memory_create(engine, 1, 0, NULL, &error));
  NULL_IS_REFUSED("engine", flashpack_memory_create(NULL, 1, 0, &memory, &error));
  NULL_IS_REFUSED("engine", flashpack_start_load(NULL, &load, &transfer, &error));
  NULL_IS_REFUSED("request", flashpack_start_load(engine, NULL, &transfer, &error));
  NULL_IS_REFUSED("transfer", flashpack_start_load(engine, &load, NULL, &error));
  NULL_IS_REFUSED("request", flashpack_load(engine, NULL, &error));
  NULL_IS_REFUSED("transfer", flashpack_transfer_wait(NULL, &error));
  NULL_IS_REFUSED("transfer", flashpack_transfer_wait_for(NULL, 0, &error));
  NULL_IS_REFUSED("transfer", flashpack_transfer_file_status(NULL, 0, &error));
  NULL_IS_REFUSED("transfer", flashpack_transfer_cancel(NULL, &error));
  NULL_IS_REFUSED("transfer", flashpack_transfer_get_progress(NULL, NULL, &error));
  NULL_IS_REFUSED("transfer", flashpack_transfer_get_stats(NULL, NULL, &error));
  NULL_IS_REFUSED("request->checkpoint", flashpack_load_all(engine, &load, &tensors, &error));
  NULL_IS_REFUSED("tensors", flashpack_load_all(engine, &load, NULL, &error));
  NULL_IS_REFUSED("transfer", flashpack_start_load_all(engine, &load, &tensors, NULL, &error));
  transfer = (flashpack_transfer*)&load;
  NULL_IS_REFUSED("tensors", flashpack_start_load_all(engine, &load, NULL, &transfer, &error));
  CHECK(!transfer);
  NULL_IS_REFUSED("tensors", flashpack_tensors_data(NULL, 0, &data, &error));
  NULL_IS_REFUSED("checkpoint", flashpack_verify(engine, NULL, 0, NULL, &error));
  NULL_IS_REFUSED("engine", flashpack_writer_create(NULL, "x", NULL, &writer, &error));
  NULL_IS_REFUSED("path", flashpack_writer_create(engine, NULL, NULL, &writer, &error));
  NULL_IS_REFUSED("writer", flashpack_start_write(NULL, &write, &transfer, &error));
  NULL_IS_REFUSED("writer", flashpack_write(NULL, &write, &error));
  NULL_IS_REFUSED("writer", flashpack_writer_commit(NULL, NULL, 0, &error));
  NULL_IS_REFUSED("events", flashpack_events_create(NULL, &error));
  NULL_IS_REFUSED("events", flashpack_events_take(NULL, NULL, 0, &index, &error));
  NULL_IS_REFUSED("count", flashpack_events_take(NULL, NULL, 0, NULL, &error));
  NULL_IS_REFUSED("path", flashpack_save(engine, NULL, NULL, 0, NULL, &error));
  CHECK(flashpack_transfer_wait(NULL, NULL) == FLASHPACK_INVALID_ARGUMENT);
  flashpack_engine_destroy(engine);
}

TEST(tuned_options_need_a_path_and_a_struct) {
  flashpack_engine_options options = {sizeof options};
  NULL_IS_REFUSED("path", flashpack_tuned_options(NULL, &options, &error));
  NULL_IS_REFUSED("options", flashpack_tuned_options("/", NULL, &error));
  options.device_kind = 2;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "device_kind", flashpack_tuned_options("/", &options, &error));
}

TEST(a_struct_without_its_size_is_refused) {
  flashpack_engine_options options = {0};
  flashpack_engine* engine = NULL;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "options->struct_size is 0", flashpack_engine_create(&options, &engine, &error));
  engine = new_engine();
  flashpack_engine_info info = {offsetof(flashpack_engine_info, fallback_reason)};
  FAILS(FLASHPACK_INVALID_ARGUMENT, "info->struct_size is", flashpack_engine_get_info(engine, &info, &error));
  flashpack_load_request request = {sizeof(void*)};
  FAILS(FLASHPACK_INVALID_ARGUMENT, "request->struct_size is", flashpack_load(engine, &request, &error));
  flashpack_engine_destroy(engine);
}

TEST(a_struct_of_an_earlier_version_is_filled_and_no_byte_behind_it) {
  flashpack_engine* engine = new_engine();
  flashpack_engine_info info = {offsetof(flashpack_engine_info, pinned_bytes)};
  info.pinned_bytes = 5;
  OK(flashpack_engine_get_info(engine, &info, &error));
  CHECK(info.workers == 2 && info.fallback_reason && info.pinned_bytes == 5);
  info.struct_size = sizeof info;
  OK(flashpack_engine_get_info(engine, &info, &error));
  CHECK(info.pinned_bytes == 0);
  flashpack_engine_destroy(engine);
}

TEST(a_struct_of_a_later_version_is_taken_as_long_as_it_asks_for_nothing_new) {
  struct {
    flashpack_engine_options options;
    uint64_t later;
  } options = {.options = {sizeof options}};
  flashpack_engine* engine = NULL;
  OK(flashpack_engine_create(&options.options, &engine, &error));
  struct {
    flashpack_engine_info info;
    uint64_t later;
    uint64_t behind;
  } info = {.info = {offsetof(__typeof__(info), behind)}, .later = 5, .behind = 5};
  OK(flashpack_engine_get_info(engine, &info.info, &error));
  CHECK(info.info.chunk_bytes == 4 << 20 && info.info.queue_depth == 8 && info.later == 0 && info.behind == 5);
  CHECK(info.info.struct_size == offsetof(__typeof__(info), behind));
  flashpack_engine_destroy(engine);
  options.later = 1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "does not know", flashpack_engine_create(&options.options, &engine, &error));
  CHECK(!engine);
}

TEST(options_of_an_engine_are_checked_and_kept) {
  flashpack_engine_options options = {sizeof options};
  flashpack_engine* engine = NULL;
  options.chunk_bytes = 3 << 20;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "power of two", flashpack_engine_create(&options, &engine, &error));
  options.chunk_bytes = 1 << 20;
  options.backend = 4;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "options->backend", flashpack_engine_create(&options, &engine, &error));
  options.backend = FLASHPACK_BACKEND_WORKERS;
  options.cpu_count = 1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "cpu_affinity is NULL", flashpack_engine_create(&options, &engine, &error));
  const int32_t cpu = 0;
  options.cpu_affinity = &cpu;
  options.staging_bytes = 8 << 20;
  options.queue_depth = 3;
  options.workers = 3;
  OK(flashpack_engine_create(&options, &engine, &error));
  flashpack_engine_info info = {sizeof info};
  OK(flashpack_engine_get_info(engine, &info, &error));
  CHECK(info.chunk_bytes == 1 << 20 && info.staging_bytes == 8 << 20 && info.queue_depth == 3 && info.workers == 3);
  CHECK(info.backend == FLASHPACK_BACKEND_WORKERS && info.fallback_reason);
  flashpack_engine_destroy(engine);
}

TEST(an_engine_uses_staging_memory_of_the_caller) {
  flashpack_engine_options options = {sizeof options};
  flashpack_engine* engine = NULL;
  options.chunk_bytes = 1 << 20;
  options.staging = aligned_alloc(4096, (4 << 20) + 4096);
  CHECK(options.staging);
  FAILS(FLASHPACK_INVALID_ARGUMENT, "staging_bytes", flashpack_engine_create(&options, &engine, &error));
  options.staging_bytes = (4 << 20) + 4096;
  memset(options.staging, 0, options.staging_bytes);
  OK(flashpack_engine_create(&options, &engine, &error));
  flashpack_engine_info info = {sizeof info};
  OK(flashpack_engine_get_info(engine, &info, &error));
  CHECK(info.staging_bytes == 4 << 20);
  const char* path = make_file("file", 2 << 20);
  unsigned char* memory = malloc((2 << 20) + 1);
  const flashpack_extent extent = {.size_bytes = 2 << 20, .target = memory + 1};
  flashpack_load_request request = {sizeof request};
  request.paths = &path;
  request.path_count = 1;
  request.extents = &extent;
  request.extent_count = 1;
  request.cache = FLASHPACK_CACHE_DIRECT;
  OK(flashpack_load(engine, &request, &error));
  flashpack_engine_destroy(engine);
  for (size_t i = 0; i < 2 << 20; ++i) CHECK(memory[1 + i] == byte_at(i));
  options.staging = (char*)options.staging + 1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "staging", flashpack_engine_create(&options, &engine, &error));
  free((char*)options.staging - 1);
  free(memory);
}

TEST(a_gpu_that_is_not_there_is_an_error) {
  flashpack_engine_options options = {sizeof options};
  options.device_kind = FLASHPACK_DEVICE_CUDA;
  options.device_index = 1000;
  flashpack_engine* engine = NULL;
  flashpack_error* error = NULL;
  const flashpack_status status = flashpack_engine_create(&options, &engine, &error);
  CHECK(!engine && (status == FLASHPACK_CUDA_ERROR || status == ENOTSUP));
  CHECK(status == ENOTSUP || strstr(flashpack_error_message(error), "cudaError"));
  flashpack_error_destroy(error);
  options.device_kind = 2;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "device_kind", flashpack_engine_create(&options, &engine, &error));
}

TEST(further_gpus_are_checked_and_unknown_to_older_callers) {
  flashpack_engine_options options = {sizeof options};
  const int32_t more_devices[] = {4, 7};
  flashpack_engine* engine = NULL;
  options.more_device_count = 2;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "more_devices is NULL", flashpack_engine_create(&options, &engine, &error));
  options.more_devices = more_devices;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "more_devices is for CUDA devices alone",
        flashpack_engine_create(&options, &engine, &error));
  options.device_kind = FLASHPACK_DEVICE_CUDA;
  options.device_index = 7;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "CUDA device 7 twice", flashpack_engine_create(&options, &engine, &error));
  options.device_kind = FLASHPACK_DEVICE_HOST;
  options.struct_size = offsetof(flashpack_engine_options, more_devices);
  OK(flashpack_engine_create(&options, &engine, &error));
  flashpack_engine_destroy(engine);
}

TEST(streams_of_further_gpus_are_no_more_than_these) {
  flashpack_engine* engine = new_engine();
  flashpack_writer* writer = NULL;
  flashpack_load_request load = {sizeof load};
  flashpack_write_request write = {sizeof write};
  flashpack_save_options save = {sizeof save};
  const flashpack_save_tensor tensor = {.name = "x", .name_bytes = 1, .data = "x", .dtype = FLASHPACK_DTYPE_UINT8};
  OK(flashpack_writer_create(engine, in_folder("new"), NULL, &writer, &error));
  load.more_stream_count = write.more_stream_count = save.more_stream_count = 1;
  NULL_IS_REFUSED("more_streams", flashpack_load(engine, &load, &error));
  NULL_IS_REFUSED("more_streams", flashpack_write(writer, &write, &error));
  NULL_IS_REFUSED("more_streams", flashpack_save(engine, in_folder("file"), &tensor, 1, &save, &error));
  void* const stream = NULL;
  load.more_streams = write.more_streams = save.more_streams = &stream;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "more_devices", flashpack_load(engine, &load, &error));
  FAILS(FLASHPACK_INVALID_ARGUMENT, "more_devices", flashpack_write(writer, &write, &error));
  FAILS(FLASHPACK_INVALID_ARGUMENT, "more_devices",
        flashpack_save(engine, in_folder("file"), &tensor, 1, &save, &error));
  load.struct_size = offsetof(flashpack_load_request, continue_on_error);
  OK(flashpack_load(engine, &load, &error));
  flashpack_writer_destroy(writer);
  flashpack_engine_destroy(engine);
}

TEST(what_no_memory_can_hold_is_an_error_of_the_system) {
  flashpack_engine* engine = new_engine();
  const flashpack_save_tensor tensor = {.name = "x", .name_bytes = SIZE_MAX / 2, .data = "x"};
  FAILS(ENOMEM, "memory", flashpack_save(engine, in_folder("file"), &tensor, 1, NULL, &error));
  flashpack_engine_destroy(engine);
}

TEST(the_library_is_that_of_the_header) { CHECK(strcmp(flashpack_version(), FLASHPACK_VERSION_STRING) == 0); }

static void check_child(flashpack_engine* engine, flashpack_transfer* transfer, flashpack_writer* writer,
                        const flashpack_load_request* request) {
  flashpack_progress progress = {sizeof progress};
  FAILS(FLASHPACK_UNUSABLE, "fork", flashpack_load(engine, request, &error));
  FAILS(FLASHPACK_UNUSABLE, "fork", flashpack_transfer_wait(transfer, &error));
  FAILS(FLASHPACK_UNUSABLE, "fork", flashpack_transfer_wait_for(transfer, 0, &error));
  FAILS(FLASHPACK_UNUSABLE, "fork", flashpack_transfer_cancel(transfer, &error));
  FAILS(FLASHPACK_UNUSABLE, "fork", flashpack_transfer_get_progress(transfer, &progress, &error));
  FAILS(FLASHPACK_UNUSABLE, "fork", flashpack_writer_commit(writer, NULL, 0, &error));
  flashpack_transfer_destroy(transfer);
  flashpack_writer_destroy(writer);
  flashpack_engine_destroy(engine);
#if !FLASHPACK_TSAN  // It lets no child start threads.
  engine = new_engine();
  OK(flashpack_load(engine, request, &error));
  flashpack_engine_destroy(engine);
#endif
  _exit(0);
}

TEST(a_forked_child_is_refused_and_makes_an_engine_of_its_own) {
  flashpack_engine* engine = new_engine();
  const char* path = make_file("file", 1 << 20);
  unsigned char* memory = malloc(1 << 20);
  const flashpack_extent extent = {.size_bytes = 1 << 20, .target = memory};
  flashpack_load_request request = {sizeof request};
  request.paths = &path;
  request.path_count = 1;
  request.extents = &extent;
  request.extent_count = 1;
  flashpack_transfer* transfer = NULL;
  flashpack_writer* writer = NULL;
  OK(flashpack_start_load(engine, &request, &transfer, &error));
  OK(flashpack_writer_create(engine, in_folder("new"), NULL, &writer, &error));
  const pid_t child = fork();
  if (child == 0) check_child(engine, transfer, writer, &request);
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  OK(flashpack_transfer_wait(transfer, &error));
  OK(flashpack_writer_commit(writer, "x", 1, &error));
  flashpack_writer_destroy(writer);
  flashpack_transfer_destroy(transfer);
  flashpack_engine_destroy(engine);
  CHECK(memory[77] == byte_at(77));
  free(memory);
}
