#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>

#include "tests/c/check.h"

enum { SIZE = 3 << 20 };
static const int64_t hang_ns = INT64_C(120000000000);

static int right(const unsigned char* memory, size_t offset, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    if (memory[i] != byte_at(offset + i)) return 0;
  }
  return 1;
}

// A load of all of a file of SIZE bytes.
typedef struct whole_file {
  const char* path;
  unsigned char* memory;
  flashpack_extent extent;
  flashpack_load_request request;
} whole_file;

static void make_whole_file(whole_file* load) {
  memset(load, 0, sizeof *load);
  load->path = make_file("whole", SIZE);
  load->memory = malloc(SIZE);
  CHECK(load->memory);
  load->extent.size_bytes = SIZE;
  load->extent.target = load->memory;
  load->request.struct_size = sizeof load->request;
  load->request.paths = &load->path;
  load->request.path_count = 1;
  load->request.extents = &load->extent;
  load->request.extent_count = 1;
}

TEST(extents_of_several_paths_arrive_in_their_places) {
  flashpack_engine* engine = new_engine();
  const char* const paths[] = {make_file("a", SIZE), make_file("b", 5000)};
  unsigned char a[1000], b[17], c[4096];
  const flashpack_extent extents[] = {
      {.file = 1, .offset_bytes = 4000, .size_bytes = sizeof a, .target = a},
      {.file = 0, .priority = 3, .offset_bytes = 77, .size_bytes = sizeof b, .target = b},
      {.file = 0, .offset_bytes = 1 << 20, .size_bytes = sizeof c, .target = c},
  };
  flashpack_load_request request = {sizeof request};
  request.paths = paths;
  request.path_count = 2;
  request.extents = extents;
  request.extent_count = 3;
  OK(flashpack_load(engine, &request, &error));
  CHECK(right(a, 4000, sizeof a) && right(b, 77, sizeof b) && right(c, 1 << 20, sizeof c));
  flashpack_engine_destroy(engine);
}

TEST(a_trace_of_the_engine_is_complete_when_it_has_ended) {
  flashpack_engine_options options = {sizeof options};
  flashpack_engine* engine = NULL;
  options.trace_path = "/none/trace.json";
  FAILS(ENOENT, "/none/trace.json", flashpack_engine_create(&options, &engine, &error));
  options.trace_path = in_folder("trace.json");
  OK(flashpack_engine_create(&options, &engine, &error));
  whole_file load;
  make_whole_file(&load);
  OK(flashpack_load(engine, &load.request, &error));
  flashpack_engine_destroy(engine);
  static char text[1 << 16];
  FILE* file = fopen(options.trace_path, "r");
  CHECK(file);
  const size_t size = fread(text, 1, sizeof text - 1, file);
  CHECK(fclose(file) == 0 && size > 2);
  CHECK(strstr(text, "\"name\":\"transfer\"") && strstr(text, load.path) && strcmp(text + size - 2, "]\n") == 0);
  free(load.memory);
}

TEST(a_descriptor_takes_the_place_of_a_path) {
  flashpack_engine* engine = new_engine();
  whole_file load;
  make_whole_file(&load);
  const int32_t fd = open(load.path, O_RDONLY);
  CHECK(fd >= 0 && unlink(load.path) == 0);
  load.request.fds = &fd;
  OK(flashpack_load(engine, &load.request, &error));
  CHECK(right(load.memory, 0, SIZE) && close(fd) == 0);
  const int32_t none = -1;
  load.request.fds = &none;
  FAILS(ENOENT, load.path, flashpack_load(engine, &load.request, &error));
  free(load.memory);
  flashpack_engine_destroy(engine);
}

TEST(a_file_that_is_kept_open_is_read_whatever_is_at_its_path) {
  flashpack_engine* engine = new_engine();
  whole_file load;
  make_whole_file(&load);
  flashpack_open_file* file = NULL;
  OK(flashpack_open_file_open(engine, load.path, -1, &file, &error));
  const int fd = open(load.path, O_RDONLY);
  CHECK(fd >= 0 && unlink(load.path) == 0);
  const flashpack_open_file* const files[] = {file};
  load.request.open_files = files;
  OK(flashpack_load(engine, &load.request, &error));
  CHECK(right(load.memory, 0, SIZE));
  load.extent.size_bytes = 100;
  for (uint64_t i = 0; i < 1000; ++i) {
    load.extent.offset_bytes = i * 4093 % (SIZE - 100);
    OK(flashpack_load(engine, &load.request, &error));
    CHECK(right(load.memory, load.extent.offset_bytes, 100));
  }
  flashpack_transfer* transfer = NULL;
  OK(flashpack_start_load(engine, &load.request, &transfer, &error));
  flashpack_open_file_destroy(file);
  OK(flashpack_transfer_wait(transfer, &error));
  flashpack_transfer_destroy(transfer);
  FAILS(ENOENT, load.path, flashpack_open_file_open(engine, load.path, -1, &file, &error));
  CHECK(!file);
  OK(flashpack_open_file_open(engine, load.path, fd, &file, &error));
  CHECK(close(fd) == 0);
  const flashpack_open_file* const others[] = {file};
  load.request.open_files = others;
  OK(flashpack_load(engine, &load.request, &error));
  flashpack_open_file_destroy(file);
  const flashpack_open_file* const none[] = {NULL};
  load.request.open_files = none;
  FAILS(ENOENT, load.path, flashpack_load(engine, &load.request, &error));
  flashpack_engine_destroy(engine);
  free(load.memory);
}

TEST(an_open_file_tells_its_size_and_whether_it_has_changed) {
  flashpack_engine* engine = new_engine();
  const char* path = make_file("file", 5000);
  flashpack_open_file* file = NULL;
  OK(flashpack_open_file_open(engine, path, -1, &file, &error));
  flashpack_open_file_info info = {sizeof info};
  OK(flashpack_open_file_get_info(file, &info, &error));
  CHECK(info.size_bytes == 5000 && info.alignment_bytes >= 4096 && info.alignment_bytes % 4096 == 0);
  OK(flashpack_open_file_check(file, &error));
  CHECK(truncate(path, 4999) == 0);
  FAILS(FLASHPACK_FILE_CHANGED, path, flashpack_open_file_check(file, &error));
  OK(flashpack_open_file_get_info(file, &info, &error));
  CHECK(info.size_bytes == 5000);
  flashpack_open_file_destroy(file);
  CHECK(mkfifo(in_folder("pipe"), 0600) == 0);
  FAILS(FLASHPACK_INVALID_ARGUMENT, "pipe", flashpack_open_file_open(engine, in_folder("pipe"), -1, &file, &error));
  flashpack_engine_destroy(engine);
}

TEST(a_transfer_tells_how_it_went) {
  flashpack_engine* engine = new_engine();
  whole_file load;
  make_whole_file(&load);
  flashpack_transfer* transfer = NULL;
  OK(flashpack_start_load(engine, &load.request, &transfer, &error));
  OK(flashpack_transfer_wait_for(transfer, hang_ns, &error));
  OK(flashpack_transfer_wait(transfer, &error));
  OK(flashpack_transfer_wait_for(transfer, 0, &error));
  flashpack_progress progress = {sizeof progress};
  OK(flashpack_transfer_get_progress(transfer, &progress, &error));
  CHECK(progress.finished && progress.done_bytes == SIZE && progress.total_bytes == SIZE);
  flashpack_stats stats = {sizeof stats};
  OK(flashpack_transfer_get_stats(transfer, &stats, &error));
  CHECK(stats.requested_bytes == SIZE && stats.direct_bytes + stats.buffered_bytes >= SIZE && stats.seconds > 0);
  CHECK(stats.backend != FLASHPACK_BACKEND_AUTO && stats.fallback_reason && stats.operations > 0);
  OK(flashpack_transfer_cancel(transfer, &error));
  OK(flashpack_transfer_wait(transfer, &error));
  flashpack_engine_destroy(engine);
  OK(flashpack_transfer_wait(transfer, &error));
  flashpack_transfer_destroy(transfer);
  CHECK(right(load.memory, 0, SIZE));
  free(load.memory);
}

// Whoever opens the file waits until the lease is given back. The descriptor that holds it, or -1 where files have
// none.
static int take_lease(const char* path) {
  const int fd = open(path, O_RDWR);
  CHECK(fd >= 0 && signal(SIGIO, SIG_IGN) != SIG_ERR);
  if (fcntl(fd, F_SETLEASE, F_WRLCK) == 0) return fd;
  close(fd);
  return -1;
}

TEST(a_transfer_that_is_cancelled_under_way_ends_cancelled) {
  flashpack_engine* engine = new_engine();
  whole_file load;
  make_whole_file(&load);
  const int lease = take_lease(load.path);
  if (lease < 0) exit(SKIPPED);
  flashpack_transfer* transfer = NULL;
  OK(flashpack_start_load(engine, &load.request, &transfer, &error));
  flashpack_error* error = (flashpack_error*)&error;
  CHECK(flashpack_transfer_wait_for(transfer, 0, &error) == FLASHPACK_RUNNING && !error);
  flashpack_stats stats = {sizeof stats};
  CHECK(flashpack_transfer_get_stats(transfer, &stats, &error) == FLASHPACK_RUNNING && !error);
  OK(flashpack_transfer_cancel(transfer, &error));
  CHECK(fcntl(lease, F_SETLEASE, F_UNLCK) == 0 && close(lease) == 0);
  FAILS(FLASHPACK_CANCELLED, "cancelled", flashpack_transfer_wait(transfer, &error));
  FAILS(FLASHPACK_CANCELLED, load.path, flashpack_transfer_wait_for(transfer, 0, &error));
  OK(flashpack_transfer_get_stats(transfer, &stats, &error));
  flashpack_transfer_destroy(transfer);
  flashpack_engine_destroy(engine);
  free(load.memory);
}

TEST(a_transfer_that_is_destroyed_under_way_lets_its_memory_go) {
  flashpack_engine* engine = new_engine();
  whole_file load;
  make_whole_file(&load);
  for (int i = 0; i < 50; ++i) {
    flashpack_transfer* transfer = NULL;
    OK(flashpack_start_load(engine, &load.request, &transfer, &error));
    flashpack_transfer_destroy(transfer);
    memset(load.memory, i, SIZE);
    CHECK(load.memory[0] == i && load.memory[SIZE - 1] == i);
  }
  free(load.memory);
  flashpack_engine_destroy(engine);
}

TEST(an_engine_that_is_destroyed_under_way_finishes_its_transfers) {
  whole_file load;
  make_whole_file(&load);
  for (int i = 0; i < 20; ++i) {
    flashpack_engine* engine = new_engine();
    flashpack_transfer* transfer = NULL;
    memset(load.memory, 0, SIZE);
    OK(flashpack_start_load(engine, &load.request, &transfer, &error));
    flashpack_engine_destroy(engine);
    CHECK(right(load.memory, 0, SIZE));
    OK(flashpack_transfer_wait_for(transfer, 0, &error));
    flashpack_transfer_destroy(transfer);
  }
  free(load.memory);
}

static void* wait_for_it(void* transfer) {
  OK(flashpack_transfer_wait_for(transfer, hang_ns, &error));
  flashpack_stats stats = {sizeof stats};
  OK(flashpack_transfer_get_stats(transfer, &stats, &error));
  return strlen(stats.fallback_reason) < 10000 ? transfer : NULL;
}

TEST(any_thread_may_wait) {
  flashpack_engine* engine = new_engine();
  whole_file load;
  make_whole_file(&load);
  flashpack_transfer* transfer = NULL;
  OK(flashpack_start_load(engine, &load.request, &transfer, &error));
  pthread_t threads[4];
  for (int i = 0; i < 4; ++i) CHECK(pthread_create(&threads[i], NULL, wait_for_it, transfer) == 0);
  OK(flashpack_transfer_wait(transfer, &error));
  for (int i = 0; i < 4; ++i) {
    void* result = NULL;
    CHECK(pthread_join(threads[i], &result) == 0 && result == transfer);
  }
  flashpack_transfer_destroy(transfer);
  flashpack_engine_destroy(engine);
  free(load.memory);
}

TEST(a_timeout_that_has_passed_ends_a_load) {
  flashpack_engine* engine = new_engine();
  whole_file load;
  make_whole_file(&load);
  const int lease = take_lease(load.path);
  if (lease < 0) exit(SKIPPED);
  load.request.timeout_ns = 1;
  flashpack_transfer* transfer = NULL;
  OK(flashpack_start_load(engine, &load.request, &transfer, &error));
  CHECK(flashpack_transfer_wait_for(transfer, 1, NULL) != FLASHPACK_OK);
  CHECK(fcntl(lease, F_SETLEASE, F_UNLCK) == 0 && close(lease) == 0);
  FAILS(FLASHPACK_DEADLINE_EXCEEDED, load.path, flashpack_transfer_wait(transfer, &error));
  flashpack_transfer_destroy(transfer);
  load.request.timeout_ns = INT64_MAX;
  OK(flashpack_load(engine, &load.request, &error));
  load.request.timeout_ns = -1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "timeout_ns", flashpack_load(engine, &load.request, &error));
  free(load.memory);
  flashpack_engine_destroy(engine);
}

TEST(errors_of_a_load_say_what_where_and_why) {
  flashpack_engine* engine = new_engine();
  whole_file load;
  make_whole_file(&load);
  load.extent.offset_bytes = 1;
  flashpack_error* error = NULL;
  CHECK(flashpack_load(engine, &load.request, &error) == FLASHPACK_TRUNCATED);
  CHECK(strstr(flashpack_error_message(error), "short read") && strcmp(flashpack_error_path(error), load.path) == 0);
  flashpack_error_destroy(error);
  const char* missing = in_folder("missing");
  load.request.paths = &missing;
  FAILS(ENOENT, missing, flashpack_load(engine, &load.request, &error));
  CHECK(flashpack_load(engine, &load.request, NULL) == ENOENT);
  free(load.memory);
  flashpack_engine_destroy(engine);
}

TEST(wrong_requests_are_refused_before_anything_is_read) {
  flashpack_engine* engine = new_engine();
  whole_file load;
  make_whole_file(&load);
  flashpack_load_request request = load.request;
  request.cache = 3;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "request->cache has no value 3", flashpack_load(engine, &request, &error));
  request = load.request;
  request.verify = FLASHPACK_VERIFY_ALWAYS;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "cannot be verified", flashpack_load(engine, &request, &error));
  request = load.request;
  request.report_extents = 1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "has no events", flashpack_load(engine, &request, &error));
  request = load.request;
  request.paths = NULL;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "request->paths is NULL", flashpack_load(engine, &request, &error));
  const char* none = NULL;
  request.paths = &none;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "request->paths is NULL", flashpack_load(engine, &request, &error));
  load.extent.file = 1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "file 1, of 1", flashpack_load(engine, &load.request, &error));
  load.extent.file = 0;
  load.extent.reserved = 1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "reserved", flashpack_load(engine, &load.request, &error));
  load.extent.reserved = 0;
  load.extent.target = NULL;
  FAILS(FLASHPACK_INVALID_ARGUMENT, load.path, flashpack_load(engine, &load.request, &error));
  request = load.request;
  request.extent_count = 0;
  OK(flashpack_load(engine, &request, &error));
  free(load.memory);
  flashpack_engine_destroy(engine);
}

TEST(a_file_that_fails_leaves_the_others_alone_if_the_request_says_so) {
  flashpack_engine* engine = new_engine();
  // The second path has no extents, so that files of the engine are numbered in another way than the caller's.
  const char* const paths[] = {make_file("a", SIZE), "/no/such/file", "/none/either", make_file("b", SIZE)};
  unsigned char* a = malloc(SIZE);
  unsigned char* b = malloc(SIZE);
  unsigned char none[10];
  CHECK(a && b);
  const flashpack_extent extents[] = {{.file = 0, .size_bytes = SIZE, .target = a},
                                      {.file = 2, .size_bytes = sizeof none, .target = none},
                                      {.file = 3, .size_bytes = SIZE, .target = b}};
  flashpack_load_request request = {sizeof request};
  request.paths = paths;
  request.path_count = 4;
  request.extents = extents;
  request.extent_count = 3;
  request.continue_on_error = 1;
  flashpack_transfer* transfer = NULL;
  OK(flashpack_start_load(engine, &request, &transfer, &error));
  FAILS(ENOENT, "1 of 3 files failed: open /none/either: ", flashpack_transfer_wait(transfer, &error));
  OK(flashpack_transfer_file_status(transfer, 0, &error));
  OK(flashpack_transfer_file_status(transfer, 1, &error));
  OK(flashpack_transfer_file_status(transfer, 3, &error));
  flashpack_error* error = NULL;
  CHECK(flashpack_transfer_file_status(transfer, 2, &error) == ENOENT);
  CHECK(strcmp(flashpack_error_path(error), "/none/either") == 0);
  CHECK(strstr(flashpack_error_message(error), "open /none/either: ") == flashpack_error_message(error));
  flashpack_error_destroy(error);
  FAILS(FLASHPACK_INVALID_ARGUMENT, "no file 4 of 4", flashpack_transfer_file_status(transfer, 4, &error));
  CHECK(right(a, 0, SIZE) && right(b, 0, SIZE));
  flashpack_transfer_destroy(transfer);

  request.continue_on_error = 0;
  OK(flashpack_start_load(engine, &request, &transfer, &error));
  FAILS(ENOENT, "open /none/either: ", flashpack_transfer_wait(transfer, &error));
  FAILS(FLASHPACK_INVALID_ARGUMENT, "not started with continue_on_error",
        flashpack_transfer_file_status(transfer, 0, &error));
  flashpack_transfer_destroy(transfer);
  free(a);
  free(b);
  flashpack_engine_destroy(engine);
}

TEST(a_load_that_continues_needs_a_transfer_that_can_be_asked) {
  flashpack_engine* engine = new_engine();
  whole_file load;
  make_whole_file(&load);
  flashpack_transfer* transfer = NULL;
  flashpack_tensors* tensors = NULL;
  load.request.continue_on_error = 1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "no transfer", flashpack_load(engine, &load.request, &error));
  FAILS(FLASHPACK_INVALID_ARGUMENT, "no transfer", flashpack_load_all(engine, &load.request, &tensors, &error));
  load.request.reserved = 1;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "reserved", flashpack_start_load(engine, &load.request, &transfer, &error));
  free(load.memory);
  flashpack_engine_destroy(engine);
}

static void save_one_tensor(flashpack_engine* engine, const char* path, const char* name) {
  static float values[1000];
  const int64_t shape = 1000;
  const flashpack_save_tensor tensor = {.name = name,
                                        .name_bytes = strlen(name),
                                        .shape = &shape,
                                        .dims = 1,
                                        .data = values,
                                        .dtype = FLASHPACK_DTYPE_FLOAT32};
  OK(flashpack_save(engine, path, &tensor, 1, NULL, &error));
}

TEST(a_file_of_a_checkpoint_that_is_corrupt_names_its_tensors_and_leaves_the_others_alone) {
  flashpack_engine* engine = new_engine();
  const char* const paths[] = {in_folder("one.flashpack"), in_folder("two.flashpack")};
  save_one_tensor(engine, paths[0], "one.weight");
  save_one_tensor(engine, paths[1], "two.weight");
  FILE* file = fopen(paths[0], "r+b");
  CHECK(file && fputc(1, file) == 1 && fclose(file) == 0);
  flashpack_load_request request = {sizeof request};
  flashpack_checkpoint* checkpoint = NULL;
  OK(flashpack_checkpoint_open_files(paths, 2, &checkpoint, &error));
  request.checkpoint = checkpoint;
  request.continue_on_error = 1;
  flashpack_tensors* tensors = NULL;
  flashpack_transfer* transfer = NULL;
  OK(flashpack_start_load_all(engine, &request, &tensors, &transfer, &error));
  FAILS(FLASHPACK_CORRUPT, "1 of 2 files failed: verify ", flashpack_transfer_wait(transfer, &error));
  FAILS(FLASHPACK_CORRUPT, "one.weight", flashpack_transfer_file_status(transfer, 0, &error));
  OK(flashpack_transfer_file_status(transfer, 1, &error));
  flashpack_transfer_destroy(transfer);
  flashpack_tensors_destroy(tensors);
  request.verify = FLASHPACK_VERIFY_ALWAYS;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "verifies always",
        flashpack_start_load_all(engine, &request, &tensors, &transfer, &error));
  flashpack_checkpoint_destroy(checkpoint);
  flashpack_engine_destroy(engine);
}

TEST(memory_has_the_place_in_a_page_that_the_bytes_have_in_the_file) {
  flashpack_engine* engine = NULL;
  flashpack_memory* memory = NULL;
  flashpack_memory* none = NULL;
  OK(flashpack_engine_create(NULL, &engine, &error));
  OK(flashpack_memory_create(engine, SIZE, 100000, &memory, &error));
  unsigned char* data = flashpack_memory_data(memory);
  CHECK(data && (size_t)data % 4096 == 100000 % 4096);
  FAILS(ENOMEM, "memory", flashpack_memory_create(engine, (size_t)1 << 60, 0, &none, &error));
  CHECK(!none && !flashpack_memory_data(none));
  flashpack_memory_release_kept(engine);
  flashpack_engine_destroy(engine);
  data[0] = data[SIZE - 1] = 1;
  flashpack_memory_destroy(memory);
}
