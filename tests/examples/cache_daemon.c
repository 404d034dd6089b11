// usage: cache_daemon SOCKET MIB: keeps files in memory that other processes map, one thread for clients and loads.
//
// A client connects to SOCKET (SOCK_SEQPACKET) and sends "+PATH" to have a file fetched, or "=PATH" to be given its
// bytes as soon as they are there: a message with a descriptor of shared memory, or with the text of an error. If all
// files together have more than MIB, those are forgotten that were not asked for lately; clients keep what they have.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <flashpack/flashpack.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { FILES = 64, CLIENTS = 256, PATH_BYTES = 4096 };

typedef struct cached_file {
  char path[PATH_BYTES];  // Empty if this place in the list is free.
  int memory;
  void* bytes;
  uint64_t size_bytes, last_use;
  flashpack_transfer* transfer;  // NULL when the bytes are there.
} cached_file;

static cached_file files[FILES];
static cached_file* wanted[CLIENTS];  // What each client waits for, by its descriptor.
static uint64_t budget_bytes, used_bytes, uses;
static flashpack_engine* engine;
static flashpack_events* events;
static int loop;

static void require(int holds, const char* what) {
  if (!holds) perror(what), exit(1);
}

static void watch(int fd) {
  struct epoll_event readable = {.events = EPOLLIN, .data.fd = fd};
  if (fd >= CLIENTS || epoll_ctl(loop, EPOLL_CTL_ADD, fd, &readable) != 0) close(fd);
}

// Sends text and, unless it is -1, a descriptor. A client that does not listen misses its answer.
static void answer(int client, const char* text, int memory) {
  char control[CMSG_SPACE(sizeof memory)] __attribute__((aligned(8))) = {0};
  struct iovec part = {(void*)text, strlen(text)};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  *CMSG_FIRSTHDR(&message) = (struct cmsghdr){CMSG_LEN(sizeof memory), SOL_SOCKET, SCM_RIGHTS};
  memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &memory, sizeof memory);
  if (memory < 0) message.msg_controllen = 0;
  sendmsg(client, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static cached_file* forget(cached_file* file) {
  flashpack_transfer_destroy(file->transfer);
  if (file->bytes) munmap(file->bytes, file->size_bytes);
  if (file->memory > 0) close(file->memory);
  used_bytes -= file->size_bytes;
  memset(file, 0, sizeof *file);
  return NULL;
}

// A free place for so many bytes, or NULL. Files are forgotten for it, those first that were asked for longest ago.
static cached_file* make_room(uint64_t size_bytes) {
  for (;;) {
    cached_file *unused = NULL, *oldest = NULL;
    for (cached_file* file = files; file != files + FILES; ++file) {
      if (!*file->path) unused = file;
      if (*file->path && !file->transfer && (!oldest || file->last_use < oldest->last_use)) oldest = file;
    }
    if (unused && used_bytes + size_bytes <= budget_bytes) return unused;
    if (!oldest) return NULL;
    forget(oldest);
  }
}

// Starts to load a file into memory that can be shared. Returns NULL, with errno, if that is not possible.
static cached_file* fetch(const char* path) {
  struct stat about;
  if (stat(path, &about) != 0) return NULL;
  cached_file* file = make_room((uint64_t)about.st_size);
  if (!file) return errno = ENOMEM, NULL;
  used_bytes += file->size_bytes = (uint64_t)about.st_size;
  strcpy(file->path, path);
  file->memory = memfd_create("file", MFD_CLOEXEC);
  if (file->memory < 0 || ftruncate(file->memory, about.st_size) != 0) return forget(file);
  void* bytes = mmap(NULL, file->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file->memory, 0);
  if (bytes == MAP_FAILED) return forget(file);
  const flashpack_extent whole = {.size_bytes = file->size_bytes, .target = file->bytes = bytes};
  flashpack_load_request request = {.struct_size = sizeof request, .paths = &path, .path_count = 1};
  request.extents = &whole;
  request.extent_count = 1;
  request.events = events;
  request.tag = (uint64_t)(file - files);
  return flashpack_start_load(engine, &request, &file->transfer, NULL) ? (errno = EIO, forget(file)) : file;
}

static void serve(int client) {
  char message[PATH_BYTES] = "";
  wanted[client] = NULL;
  if (recv(client, message, sizeof message - 1, 0) <= 0 && close(client) == 0) return;
  cached_file* file = files;
  while (file != files + FILES && strcmp(file->path, message + 1) != 0) ++file;
  if (file == files + FILES) file = fetch(message + 1);
  if (file) file->last_use = ++uses;
  if (*message != '=') return;
  if (file && file->transfer) wanted[client] = file;
  if (!wanted[client]) answer(client, file ? file->path : strerror(errno), file ? file->memory : -1);
}

static void take_events(void) {
  flashpack_event event;
  for (size_t count = 0; !flashpack_events_take(events, &event, 1, &count, NULL) && count > 0;) {
    cached_file* file = &files[event.tag];
    flashpack_error* error = NULL;
    const int here = flashpack_transfer_wait(file->transfer, &error) == FLASHPACK_OK;
    for (int client = 0; client < CLIENTS; ++client) {
      if (wanted[client] != file) continue;
      answer(client, here ? file->path : flashpack_error_message(error), here ? file->memory : -1);
      wanted[client] = NULL;
    }
    flashpack_error_destroy(error);
    flashpack_transfer_destroy(file->transfer);
    file->transfer = NULL;
    if (!here) forget(file);
  }
}

int main(int argc, char** argv) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (argc != 3) return 2;
  snprintf(address.sun_path, sizeof address.sun_path, "%s", argv[1]);
  budget_bytes = strtoull(argv[2], NULL, 10) << 20;
  require(!flashpack_engine_create(NULL, &engine, NULL) && !flashpack_events_create(&events, NULL), "flashpack");
  loop = epoll_create1(EPOLL_CLOEXEC);
  const int door = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), told = flashpack_events_fd(events);
  require(bind(door, (struct sockaddr*)&address, sizeof address) == 0 && listen(door, 16) == 0, argv[1]);
  watch(door);
  watch(told);
  for (struct epoll_event ready;;) {
    if (epoll_wait(loop, &ready, 1, -1) != 1) continue;
    if (ready.data.fd == door) watch(accept4(door, NULL, NULL, SOCK_CLOEXEC));
    if (ready.data.fd == told) take_events();
    if (ready.data.fd != door && ready.data.fd != told) serve(ready.data.fd);
  }
}
