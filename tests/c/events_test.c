#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <poll.h>
#include <sys/wait.h>

#include "tests/c/check.h"

enum { SIZE = 3 << 20, EXTENTS = 6, HANG_MS = 120000 };

static flashpack_events* new_events(void) {
  flashpack_events* events = NULL;
  OK(flashpack_events_create(&events, &error));
  CHECK(flashpack_events_fd(events) >= 0);
  return events;
}

static int is_readable(const flashpack_events* events, int timeout_ms) {
  struct pollfd polled = {flashpack_events_fd(events), POLLIN, 0};
  return poll(&polled, 1, timeout_ms) == 1;
}

static size_t take(flashpack_events* events, flashpack_event* taken, size_t capacity) {
  size_t count = 77;
  OK(flashpack_events_take(events, taken, capacity, &count, &error));
  return count;
}

// Waits for an event and takes it.
static flashpack_event next(flashpack_events* events) {
  flashpack_event event;
  memset(&event, 1, sizeof event);
  CHECK(is_readable(events, HANG_MS) && take(events, &event, 1) == 1);
  CHECK(event.reserved == 0);
  return event;
}

// Loads of two files, whose extents alternate; a file between them is not read.
typedef struct two_files {
  const char* paths[3];
  unsigned char* memory;
  flashpack_extent extents[EXTENTS];
  flashpack_load_request request;
} two_files;

static void make_two_files(two_files* load, flashpack_events* events) {
  memset(load, 0, sizeof *load);
  load->paths[0] = make_file("first", SIZE);
  load->paths[1] = in_folder("none");
  load->paths[2] = make_file("last", SIZE);
  load->memory = calloc(EXTENTS, SIZE / EXTENTS);
  CHECK(load->memory);
  for (unsigned i = 0; i < EXTENTS; ++i) {
    load->extents[i].file = i % 2 ? 0 : 2;
    load->extents[i].offset_bytes = (uint64_t)i * (SIZE / EXTENTS);
    load->extents[i].size_bytes = SIZE / EXTENTS;
    load->extents[i].target = load->memory + load->extents[i].offset_bytes;
  }
  load->request.struct_size = sizeof load->request;
  load->request.paths = load->paths;
  load->request.path_count = 3;
  load->request.extents = load->extents;
  load->request.extent_count = EXTENTS;
  load->request.report_extents = 1;
  load->request.events = events;
  load->request.tag = UINT64_MAX - 1;
}

TEST(an_extent_can_be_used_when_its_event_comes) {
  flashpack_engine* engine = new_engine();
  flashpack_events* events = new_events();
  two_files load;
  make_two_files(&load, events);
  flashpack_event event;
  CHECK(!is_readable(events, 0) && take(events, &event, 1) == 0);
  flashpack_transfer* transfer = NULL;
  OK(flashpack_start_load(engine, &load.request, &transfer, &error));
  int landed[EXTENTS] = {0};
  for (int i = 0; i < EXTENTS; ++i) {
    event = next(events);
    CHECK(event.kind == FLASHPACK_EVENT_LANDED && event.tag == load.request.tag && event.extent < EXTENTS);
    CHECK(!landed[event.extent]++);
    const flashpack_extent* extent = &load.extents[event.extent];
    const unsigned char* bytes = extent->target;
    for (size_t at = 0; at < extent->size_bytes; ++at) CHECK(bytes[at] == byte_at(extent->offset_bytes + at));
  }
  event = next(events);
  CHECK(event.kind == FLASHPACK_EVENT_DONE && event.status == FLASHPACK_OK && event.tag == load.request.tag);
  CHECK(!is_readable(events, 0));
  OK(flashpack_transfer_wait(transfer, &error));
  flashpack_transfer_destroy(transfer);
  flashpack_events_destroy(events);
  flashpack_engine_destroy(engine);
  free(load.memory);
}

TEST(loads_and_writes_tell_how_they_ended_under_their_tags) {
  flashpack_engine* engine = new_engine();
  flashpack_events* events = new_events();
  two_files load;
  make_two_files(&load, events);
  load.request.report_extents = 0;
  load.request.tag = 5;
  OK(flashpack_load(engine, &load.request, &error));
  flashpack_event event = next(events);
  CHECK(event.kind == FLASHPACK_EVENT_DONE && event.tag == 5 && event.status == FLASHPACK_OK);
  load.extents[3].file = 1;
  FAILS(ENOENT, load.paths[1], flashpack_load(engine, &load.request, &error));
  event = next(events);
  CHECK(event.tag == 5 && event.status == ENOENT);
  load.extents[3].file = 0;
  load.extents[3].offset_bytes = SIZE;
  load.request.tag = 6;
  FAILS(FLASHPACK_TRUNCATED, load.paths[0], flashpack_load(engine, &load.request, &error));
  event = next(events);
  CHECK(event.tag == 6 && event.status == FLASHPACK_TRUNCATED);

  flashpack_writer* writer = NULL;
  OK(flashpack_writer_create(engine, load.paths[1], NULL, &writer, &error));
  const flashpack_source source = {.size_bytes = SIZE / EXTENTS, .source = load.memory};
  flashpack_write_request write = {.struct_size = sizeof write, .sources = &source, .source_count = 1};
  write.events = events;
  write.tag = 7;
  OK(flashpack_write(writer, &write, &error));
  event = next(events);
  CHECK(event.kind == FLASHPACK_EVENT_DONE && event.tag == 7 && event.status == FLASHPACK_OK);
  FAILS(FLASHPACK_INVALID_ARGUMENT, "twice", flashpack_write(writer, &write, &error));
  CHECK(!is_readable(events, 0));
  flashpack_writer_destroy(writer);
  flashpack_events_destroy(events);
  flashpack_engine_destroy(engine);
  free(load.memory);
}

TEST(many_events_are_taken_at_once_and_in_parts) {
  enum { LOADS = 200 };
  flashpack_engine* engine = new_engine();
  flashpack_events* events = new_events();
  two_files load;
  make_two_files(&load, events);
  load.request.report_extents = 0;
  for (uint64_t i = 0; i < LOADS; ++i) {
    load.request.tag = i;
    OK(flashpack_load(engine, &load.request, &error));
  }
  flashpack_event taken[LOADS + 1];
  CHECK(take(events, taken, 0) == 0 && is_readable(events, HANG_MS));
  size_t count = take(events, taken, 70);
  CHECK(count == 70);
  while (count < LOADS) count += take(events, taken + count, LOADS + 1 - count);
  CHECK(count == LOADS && take(events, taken + count, 1) == 0);
  for (uint64_t i = 0; i < LOADS; ++i) CHECK(taken[i].tag == i && taken[i].status == FLASHPACK_OK);
  flashpack_events_destroy(events);
  flashpack_engine_destroy(engine);
  free(load.memory);
}

TEST(a_request_that_is_refused_has_no_events) {
  flashpack_engine* engine = new_engine();
  flashpack_events* events = new_events();
  two_files load;
  make_two_files(&load, events);
  load.extents[0].target = NULL;
  FAILS(FLASHPACK_INVALID_ARGUMENT, load.paths[2], flashpack_load(engine, &load.request, &error));
  CHECK(!is_readable(events, 0));
  flashpack_tensors* tensors = NULL;
  load.request.path_count = load.request.extent_count = 0;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "reports extents", flashpack_load_all(engine, &load.request, &tensors, &error));
  size_t count = 5;
  FAILS(FLASHPACK_INVALID_ARGUMENT, "taken is NULL", flashpack_events_take(events, NULL, 1, &count, &error));
  CHECK(count == 0);
  flashpack_events_destroy(events);
  flashpack_engine_destroy(engine);
  free(load.memory);
}

TEST(events_that_are_destroyed_under_way_do_not_hold_up_the_loads) {
  flashpack_engine* engine = new_engine();
  two_files load;
  make_two_files(&load, NULL);
  for (int i = 0; i < 50; ++i) {
    load.request.events = new_events();
    flashpack_transfer* transfer = NULL;
    OK(flashpack_start_load(engine, &load.request, &transfer, &error));
    flashpack_events_destroy(load.request.events);
    OK(flashpack_transfer_wait(transfer, &error));
    flashpack_transfer_destroy(transfer);
  }
  flashpack_engine_destroy(engine);
  free(load.memory);
}

TEST(a_transfer_that_is_destroyed_under_way_has_its_last_event_taken_later) {
  flashpack_engine* engine = new_engine();
  flashpack_events* events = new_events();
  two_files load;
  make_two_files(&load, events);
  for (int i = 0; i < 50; ++i) {
    flashpack_transfer* transfer = NULL;
    OK(flashpack_start_load(engine, &load.request, &transfer, &error));
    flashpack_transfer_destroy(transfer);
    flashpack_event event = next(events);
    while (event.kind != FLASHPACK_EVENT_DONE) event = next(events);
    CHECK(event.status == FLASHPACK_OK || event.status == FLASHPACK_CANCELLED);
  }
  CHECK(!is_readable(events, 0));
  flashpack_events_destroy(events);
  flashpack_engine_destroy(engine);
  free(load.memory);
}

TEST(a_forked_child_takes_no_events_of_its_parent) {
  flashpack_engine* engine = new_engine();
  flashpack_events* events = new_events();
  two_files load;
  make_two_files(&load, events);
  load.request.report_extents = 0;
  OK(flashpack_load(engine, &load.request, &error));
  const pid_t child = fork();
  if (child == 0) {
    flashpack_event event;
    size_t count = 0;
    FAILS(FLASHPACK_UNUSABLE, "fork", flashpack_events_take(events, &event, 1, &count, &error));
    FAILS(FLASHPACK_UNUSABLE, "fork", flashpack_load(engine, &load.request, &error));
    flashpack_events_destroy(events);
    _exit(0);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(next(events).status == FLASHPACK_OK);
  flashpack_events_destroy(events);
  flashpack_engine_destroy(engine);
  free(load.memory);
}

// Other threads of the parent may have been at work on what it would release.
TEST(a_forked_child_that_destroys_events_of_its_parent_releases_nothing) {
  enum { LOADS = 500 };
  flashpack_engine* engine = new_engine();
  flashpack_events* events = new_events();
  const char* path = make_file("file", 1);
  char byte = 0;
  const flashpack_extent extent = {.size_bytes = 1, .target = &byte};
  flashpack_load_request request = {sizeof request};
  request.paths = &path;
  request.path_count = 1;
  request.extents = &extent;
  request.extent_count = 1;
  request.events = events;
  for (int i = 0; i < LOADS; ++i) OK(flashpack_load(engine, &request, &error));
  const pid_t child = fork();
  if (child == 0) {
    const size_t before = mallinfo2().uordblks;
    flashpack_events_destroy(events);
    _exit(mallinfo2().uordblks == before ? 0 : 1);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  for (int i = 0; i < LOADS; ++i) CHECK(next(events).status == FLASHPACK_OK);
  flashpack_events_destroy(events);
  flashpack_engine_destroy(engine);
}
