/// The C API, for C and for every language that calls C. It is in libflashpack.so; this header is C99 and C++11.
///
///   flashpack_engine* engine = NULL;
///   flashpack_checkpoint* checkpoint = NULL;
///   flashpack_tensors* tensors = NULL;
///   flashpack_error* error = NULL;
///   flashpack_load_request request = {.struct_size = sizeof request};
///   if (flashpack_engine_create(NULL, &engine, &error) || flashpack_checkpoint_open("llama/", &checkpoint, &error) ||
///       (request.checkpoint = checkpoint, flashpack_load_all(engine, &request, &tensors, &error)))
///     fprintf(stderr, "%s\n", flashpack_error_message(error));
///
/// These rules hold for all functions:
///
/// * Status. FLASHPACK_OK is 0, a positive status is an errno of the system, and a negative one is a constant of
///   flashpack_status.h. If memory runs out, it is ENOMEM. No C++ exception leaves a function.
/// * Names. A function whose name ends with get, find, check or a noun (info, data, status, stats, fd, message, tensor)
///   only asks. Each other one acts.
/// * Errors. The last argument may be NULL. Otherwise it is set by every call: to NULL after FLASHPACK_OK and
///   FLASHPACK_RUNNING, else to a new object, which the caller destroys. What was there before is not destroyed.
/// * Handles. flashpack_X_create() and its like give a handle to the caller, who destroys it with
///   flashpack_X_destroy(), once. NULL may be destroyed. Another NULL where a handle, a string or a place for the
///   result is needed is FLASHPACK_INVALID_ARGUMENT. After a failure the place for a result holds NULL.
/// * Structs. Each begins with struct_size, which the caller sets to the sizeof() that he was compiled with, so that
///   structs can grow. A field of 0 or NULL means its default. A struct that is smaller than the first one that had its
///   name, or that sets a field which this library does not know, is FLASHPACK_INVALID_ARGUMENT. Elements of arrays do
///   not grow; their reserved fields have to be 0.
/// * Strings end with 0. Those that may hold a 0 themselves have a length beside them, which does not count the last 0.
/// * Threads. Any thread may call any function, several at the same time for one handle, too, unless a function says
///   otherwise. A handle must not be destroyed while another call uses it. The library calls nobody back. A thread must
///   not be cancelled (pthread_cancel) inside of a call. The library cannot be unloaded: its threads may live on.
/// * Fork. In a forked child, engines, transfers, writers and events of the parent are FLASHPACK_UNUSABLE. To destroy
///   them releases nothing of the parent's, and the parent loses no event. A child makes an engine of its own.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "flashpack/flashpack_checkpoint.h"
#include "flashpack/flashpack_status.h"
#include "flashpack/version.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/// The version of the library that is running, such as "1.0.0". FLASHPACK_VERSION_STRING is that of this header.
const char* flashpack_version(void);

/// Serves the host and, if wanted, one or more GPUs with threads and staging memory of its own.
typedef struct flashpack_engine flashpack_engine;

enum { FLASHPACK_DEVICE_HOST = 0, FLASHPACK_DEVICE_CUDA = 1 };

/// How direct reads and writes are carried out.
enum {
  FLASHPACK_BACKEND_AUTO = 0,            ///< io_uring where it is allowed, else the workers.
  FLASHPACK_BACKEND_IO_URING = 1,        ///< io_uring; if it is refused, the engine cannot be created.
  FLASHPACK_BACKEND_PLAIN_IO_URING = 2,  ///< io_uring without setup flags and registered buffers.
  FLASHPACK_BACKEND_WORKERS = 3          ///< pread and pwrite on the worker threads.
};

typedef struct flashpack_engine_options {
  size_t struct_size;
  int32_t device_kind;          ///< FLASHPACK_DEVICE_*. Targets and sources may always be in memory of the host.
  int32_t device_index;         ///< Number of the GPU, as for cudaSetDevice.
  uint32_t chunk_bytes;         ///< Size of a read: a power of two from 1 MiB to 1 GiB. 0 is 4 MiB.
  uint32_t queue_depth;         ///< Direct reads and writes in flight, 1 to 1024. 0 is 8. Striped arrays may need more.
  uint64_t staging_bytes;       ///< Most staging memory, at least two chunks. 0 is 64 MiB, or 96 MiB for a GPU.
  void* staging;                ///< If not NULL, memory of the caller's, of `staging_bytes` bytes from a page on, that
                                ///< this engine alone uses for it until it ends, such as huge pages or page-locked
                                ///< memory. `use_numa_node` is then 0.
  uint32_t workers;             ///< Threads for byte work, at most 64. 0 is one per core within bounds.
  int32_t backend;              ///< FLASHPACK_BACKEND_*.
  const int32_t* cpu_affinity;  ///< `cpu_count` CPUs for the engine's threads, read before the call returns.
  size_t cpu_count;             ///< 0 leaves the threads to the scheduler.
  int32_t use_numa_node;        ///< If not 0, staging memory is on `numa_node`; else the library chooses.
  int32_t numa_node;
  const int32_t* more_devices;  ///< Numbers of `more_device_count` further GPUs, read before the call returns, for an
                                ///< engine of a GPU: it serves them with the same threads and staging memory. A request
                                ///< may then have targets or sources on any of them.
  size_t more_device_count;     ///< At most 63.
  const char* trace_path;       ///< If not NULL, a file that is replaced by a trace of all that the engine does, in
                                ///< Chrome's format (JSON), for Perfetto. It is complete when the engine has ended. An
                                ///< error of writing ends the trace and nothing else. Each engine needs a file of its
                                ///< own, which is emptied even if the engine cannot be made for another reason.
} flashpack_engine_options;

/// The choices that an engine has made; strings live as long as the engine.
typedef struct flashpack_engine_info {
  size_t struct_size;
  uint64_t staging_bytes;  ///< Whole chunks, of the engine's own memory or the caller's.
  uint32_t chunk_bytes;
  uint32_t queue_depth;
  uint32_t workers;
  int32_t backend;              ///< The chosen one, never FLASHPACK_BACKEND_AUTO.
  const char* fallback_reason;  ///< Why the engine is slower than it was asked to be, or an empty string.
  uint64_t pinned_bytes;        ///< How much of the staging memory is page-locked for GPUs; 0 without them.
} flashpack_engine_info;

/// Sets chunk_bytes, queue_depth, workers, backend and, unless `staging` is set, staging_bytes to what flashpack_tune
/// has found to be best for the disk of `path`, a file or a directory, and the device that is in `options`. Errors:
/// FLASHPACK_NOT_FOUND if it has kept nothing that is better than the defaults, for which the message has the reason.
/// `options` are then as before, so that a caller may ignore it. Must not run while a thread changes the environment,
/// which says where the user's profiles are.
flashpack_status flashpack_tuned_options(const char* path, flashpack_engine_options* options, flashpack_error** error);

/// Starts an engine. `options` may be NULL. Errors: options out of range; errno when threads, memory or a forced
/// backend cannot be had, or the trace cannot be written; FLASHPACK_CUDA_ERROR, or ENOTSUP in a build without CUDA.
flashpack_status flashpack_engine_create(const flashpack_engine_options* options, flashpack_engine** engine,
                                         flashpack_error** error);
/// Works in a forked child, too.
flashpack_status flashpack_engine_get_info(const flashpack_engine* engine, flashpack_engine_info* info,
                                           flashpack_error** error);
/// Waits until all transfers of the engine have finished, then stops its threads; cancel transfers before it to end
/// early. If a writer of the engine is left, the engine itself ends with the last of them.
void flashpack_engine_destroy(flashpack_engine* engine);

/// Memory of the host that loads are fastest to: on huge pages where they are cheap, at the place in a page that the
/// bytes have in the file, and kept for the engine's next one when it is destroyed, because fresh pages cost more than
/// a read. It may outlive its engine.
typedef struct flashpack_memory flashpack_memory;

/// The contents are unspecified. `offset_bytes` is the place in the file of what `engine` will read there. Errors:
/// ENOMEM.
flashpack_status flashpack_memory_create(flashpack_engine* engine, size_t size_bytes, uint64_t offset_bytes,
                                         flashpack_memory** memory, flashpack_error** error);
/// The address of its first byte; NULL for NULL.
void* flashpack_memory_data(const flashpack_memory* memory);
/// Must not be called while a transfer uses the memory.
void flashpack_memory_destroy(flashpack_memory* memory);
/// Gives all memory that is kept for the engine's next flashpack_memory back to the system. NULL is ignored.
void flashpack_memory_release_kept(flashpack_engine* engine);

/// A file that an engine keeps open for many small loads, because to open and close it costs more than to read a
/// little. It keeps the file, whatever is at its path by now. A load through it of more than `chunk_bytes` in all
/// notices a change of the file. A smaller one does not look, but flashpack_open_file_check() does.
typedef struct flashpack_open_file flashpack_open_file;

typedef struct flashpack_open_file_info {
  size_t struct_size;
  uint64_t size_bytes;       ///< When it was opened. No extent may go past it.
  uint64_t alignment_bytes;  ///< If offset, size and address are multiples of this, a read that goes past the page
                             ///< cache needs no copy. A read of less than 128 KiB is without a copy only if no
                             ///< other extent lies within 64 KiB of it. A load of 32 MiB or more to small pages
                             ///< of a flashpack_memory is copied all the same, because that is faster. 4096 if the
                             ///< file has no direct I/O.
} flashpack_open_file_info;

/// Opens a regular file or a block device for loads of `engine`. If `fd` is not negative, it is a readable descriptor
/// of the file, which is borrowed for the call; `path` is then for messages, and needed all the same. Errors:
/// EISDIR for a directory, FLASHPACK_INVALID_ARGUMENT for files of other kinds; other errnos; FLASHPACK_UNUSABLE.
flashpack_status flashpack_open_file_open(flashpack_engine* engine, const char* path, int32_t fd,
                                          flashpack_open_file** file, flashpack_error** error);
/// Returns facts that are known since the file was opened.
flashpack_status flashpack_open_file_get_info(const flashpack_open_file* file, flashpack_open_file_info* info,
                                              flashpack_error** error);
/// FLASHPACK_FILE_CHANGED if the file is not as it was when it was opened. May block in the file system. Errors: errno.
flashpack_status flashpack_open_file_check(const flashpack_open_file* file, flashpack_error** error);
/// The file is closed after the last load through it.
void flashpack_open_file_destroy(flashpack_open_file* file);

/// Collects what happens to the transfers whose requests name it, of any engines, for event loops of any kind.
typedef struct flashpack_events flashpack_events;

enum {
  FLASHPACK_EVENT_LANDED = 0,  ///< An extent is in its memory, verified where it can be. Only with report_extents.
  FLASHPACK_EVENT_DONE = 1     ///< The transfer has finished, successfully or not. Its last event.
};

typedef struct flashpack_event {
  uint64_t tag;             ///< The number that the request had.
  uint64_t extent;          ///< Index in the extents of the request. Only of FLASHPACK_EVENT_LANDED.
  int32_t kind;             ///< FLASHPACK_EVENT_*.
  flashpack_status status;  ///< How the transfer has ended. flashpack_transfer_wait() now says why at once; it also
                            ///< fails if FLASHPACK_VERIFY_ALWAYS could not be kept. Only of FLASHPACK_EVENT_DONE.
  uint64_t reserved;
} flashpack_event;

/// Takes one descriptor. Errors: errno of eventfd(2).
flashpack_status flashpack_events_create(flashpack_events** events, flashpack_error** error);
/// A descriptor that is readable as long as an event waits. It also gives a new edge whenever an event comes and none
/// was waiting. It belongs to `events` and is only to be polled, neither read nor closed. -1 for NULL.
int32_t flashpack_events_fd(const flashpack_events* events);
/// Moves the oldest events, at most `capacity`, to `taken`, and sets `count` to their number, 0 if none waits. It never
/// waits for an event. A loop that is told of edges alone calls it until `count` is less than `capacity`.
flashpack_status flashpack_events_take(flashpack_events* events, flashpack_event* taken, size_t capacity, size_t* count,
                                       flashpack_error** error);
/// Transfers that are under way go on, and their events are lost.
void flashpack_events_destroy(flashpack_events* events);

/// A load or a write that has been started. The memory of the request (targets or sources) belongs to the caller and
/// must stay valid until the transfer has finished: flashpack_transfer_wait() or _wait_for() have returned another
/// status than FLASHPACK_RUNNING, or flashpack_transfer_destroy() has returned. All else that is in a request is needed
/// only until the start returns.
typedef struct flashpack_transfer flashpack_transfer;

enum {
  FLASHPACK_CACHE_AUTO = 0,     ///< Chunks of which at most a 64th is missing in the page cache are read through it.
  FLASHPACK_CACHE_DIRECT = 1,   ///< O_DIRECT wherever the file allows it.
  FLASHPACK_CACHE_BUFFERED = 2  ///< All reads go through the page cache.
};

/// Whether the bytes of a checkpoint are compared with its checksums. Bytes of other files are not compared.
enum {
  FLASHPACK_VERIFY_AUTO = 0,    ///< If the file has checksums, each stripe of 1 MiB that is read whole is compared.
  FLASHPACK_VERIFY_ALWAYS = 1,  ///< All bytes are; it is an error if the file has no checksums, or if extents of the
                                ///< request have a part of a stripe. flashpack_load_all() reads what is needed for it.
  FLASHPACK_VERIFY_NEVER = 2
};

/// A range of bytes of a file, and the memory that they go to. Any offset and size are valid. A load is fastest if
/// `target` and `offset_bytes` are equal modulo 4096, as in flashpack_memory.
typedef struct flashpack_extent {
  uint32_t file;      ///< Index of a file of the checkpoint, or of a path of the request.
  uint16_t priority;  ///< Extents with a lower value are read before the others of their file.
  uint16_t reserved;
  uint64_t offset_bytes;
  uint64_t size_bytes;
  void* target;  ///< `size_bytes` writable bytes of the host or of a GPU of the engine.
} flashpack_extent;

/// Names what to load: extents of the files of a checkpoint, or of files by path.
typedef struct flashpack_load_request {
  size_t struct_size;
  const flashpack_checkpoint* checkpoint;  ///< If it is NULL, `paths` are the files.
  const char* const* paths;
  size_t path_count;
  const int32_t* fds;  ///< If not NULL, a readable descriptor for each path, which is borrowed until the start returns;
                       ///< the path is only for messages then. A negative one means that the path is opened.
  const flashpack_open_file* const* open_files;  ///< If not NULL, one of this engine for each path, or NULL for none.
  const flashpack_extent* extents;               ///< They may overlap in a file, but not in memory.
  size_t extent_count;
  int32_t cache;           ///< FLASHPACK_CACHE_*.
  int32_t verify;          ///< FLASHPACK_VERIFY_*.
  int32_t drop_cached;     ///< If not 0, a file that was read through the page cache is dropped from it at the end.
  int32_t report_extents;  ///< If not 0, `events` tell of each extent that has landed, so that the first can be used
                           ///< while the rest is read. flashpack_load_all() and flashpack_start_load_all() refuse it,
                           ///< because they choose extents that have many tensors each. Give flashpack_start_load()
                           ///< one for each tensor instead.
  void* stream;  ///< A cudaStream_t of GPU `device_index`: nothing is written to a GPU before all work that is on it
                 ///< has ended, if there are targets on that GPU. NULL is its legacy default stream.
  int64_t timeout_ns;        ///< When it has passed, the transfer ends with FLASHPACK_DEADLINE_EXCEEDED. 0 is no limit.
  flashpack_events* events;  ///< If not NULL, it is told when the transfer has finished.
  uint64_t tag;              ///< Any number, which comes with these events.
  int32_t continue_on_error;  ///< If not 0, a file that fails leaves the others alone: they land, the transfer ends
                              ///< with the status of the first file that has failed, and
                              ///< flashpack_transfer_file_status() tells which have. A timeout, a cancel and an error
                              ///< of CUDA fail all files that have not landed by then. It is refused by functions that
                              ///< return no transfer, and together with FLASHPACK_VERIFY_ALWAYS, which promises that
                              ///< all files are verified.
  int32_t reserved;
  void* const* more_streams;  ///< Like `stream`, for each of the first `more_stream_count` of the engine's
                              ///< `more_devices`; NULL, or none, is the legacy default stream of that GPU.
  size_t more_stream_count;
} flashpack_load_request;

/// A snapshot of a transfer.
typedef struct flashpack_progress {
  size_t struct_size;
  uint64_t done_bytes;  ///< Bytes that are in their targets, or for a write in the file.
  uint64_t total_bytes;
  uint32_t outstanding;  ///< Operations that are under way.
  int32_t finished;      ///< 1 or 0.
} flashpack_progress;

/// Counts what a transfer has done.
typedef struct flashpack_stats {
  size_t struct_size;
  uint64_t requested_bytes;     ///< Sum of the extents' sizes.
  uint64_t direct_bytes;        ///< Bytes moved past the page cache, with those that alignment adds.
  uint64_t buffered_bytes;      ///< Bytes moved through the page cache.
  uint64_t staged_bytes;        ///< Bytes of these two that were copied once more.
  uint64_t operations;          ///< Reads and writes, retries included.
  uint64_t retries;             ///< Operations that repeat one that was short, interrupted or refused.
  uint64_t verified_bytes;      ///< Bytes that matched their checksums.
  double seconds;               ///< From the start to the end.
  int32_t backend;              ///< FLASHPACK_BACKEND_*, never FLASHPACK_BACKEND_AUTO.
  int32_t pinned;               ///< 1 if staging for a GPU is page-locked; without that, copies are slow.
  const char* fallback_reason;  ///< Each slower way that was taken, or an empty string. Lives as long as the transfer.
} flashpack_stats;

/// Starts a load and returns. Errors: FLASHPACK_INVALID_ARGUMENT for a request that is wrong whatever the files hold,
/// such as targets that are NULL or overlap; FLASHPACK_UNUSABLE; FLASHPACK_CUDA_ERROR about a stream. Errors of the
/// files, and targets on GPUs that the engine does not serve, are the transfer's, except that they cannot be read with
/// FLASHPACK_VERIFY_ALWAYS because they have no checksums.
flashpack_status flashpack_start_load(flashpack_engine* engine, const flashpack_load_request* request,
                                      flashpack_transfer** transfer, flashpack_error** error);
/// Returns when all bytes are in their targets. After an error these are unspecified, and nothing is under way.
flashpack_status flashpack_load(flashpack_engine* engine, const flashpack_load_request* request,
                                flashpack_error** error);

/// Waits until the transfer has finished, however long a read takes, and returns how it ended, now and in later calls.
flashpack_status flashpack_transfer_wait(flashpack_transfer* transfer, flashpack_error** error);
/// The same, but returns FLASHPACK_RUNNING when `timeout_ns` nanoseconds have passed. 0 only asks.
flashpack_status flashpack_transfer_wait_for(flashpack_transfer* transfer, int64_t timeout_ns, flashpack_error** error);
/// How file `file` of a load with continue_on_error has ended, an index as in flashpack_extent. FLASHPACK_OK means that
/// all of its extents are in their targets. Otherwise these are unspecified, except those that FLASHPACK_EVENT_LANDED
/// has told of. FLASHPACK_RUNNING until the transfer has finished, and FLASHPACK_INVALID_ARGUMENT for other loads.
flashpack_status flashpack_transfer_file_status(flashpack_transfer* transfer, size_t file, flashpack_error** error);
/// Makes the transfer end soon, with FLASHPACK_CANCELLED; returns at once. A transfer that has finished stays as it is.
flashpack_status flashpack_transfer_cancel(flashpack_transfer* transfer, flashpack_error** error);
/// How far the transfer is, whether it has finished or not.
flashpack_status flashpack_transfer_get_progress(flashpack_transfer* transfer, flashpack_progress* progress,
                                                 flashpack_error** error);
/// Statistics of a transfer that has finished, successfully or not; else FLASHPACK_RUNNING.
flashpack_status flashpack_transfer_get_stats(flashpack_transfer* transfer, flashpack_stats* stats,
                                              flashpack_error** error);
/// Cancels the transfer unless it has finished, and waits until nothing is under way.
void flashpack_transfer_destroy(flashpack_transfer* transfer);

/// All tensors of a checkpoint, in memory of the host.
typedef struct flashpack_tensors flashpack_tensors;

/// Allocates memory for all tensors of `request->checkpoint` and loads them. The request has no paths, fds and extents.
/// Errors: as of flashpack_load(), and ENOMEM.
flashpack_status flashpack_load_all(flashpack_engine* engine, const flashpack_load_request* request,
                                    flashpack_tensors** tensors, flashpack_error** error);
/// The same without waiting: the bytes are unspecified until the transfer has finished. Either may be destroyed first.
flashpack_status flashpack_start_load_all(flashpack_engine* engine, const flashpack_load_request* request,
                                          flashpack_tensors** tensors, flashpack_transfer** transfer,
                                          flashpack_error** error);
/// Sets `data` to the address of the elements of tensor `index` of the checkpoint, which is aligned for its type; to
/// NULL if the tensor is empty. The memory may be written, and lives as long as `tensors`.
flashpack_status flashpack_tensors_data(const flashpack_tensors* tensors, size_t index, void** data,
                                        flashpack_error** error);
/// The memory is kept for the next load, as that of flashpack_memory.
void flashpack_tensors_destroy(flashpack_tensors* tensors);

typedef struct flashpack_verify_report {
  size_t struct_size;
  uint64_t verified_bytes;        ///< Bytes that match their checksums.
  uint64_t corrupt_stripes;       ///< Stripes of 1 MiB that do not.
  uint64_t corrupt_offset_bytes;  ///< Where the first of these begins.
  double seconds;
} flashpack_verify_report;

/// Reads file `index` of the checkpoint and compares every stripe with its checksum, also after one that does not
/// match. Blocks, and takes 128 MiB of memory. `report` may be NULL. Errors: FLASHPACK_CORRUPT, whose message names the
/// tensors in the first such stripe, and for which `report` is filled, too; FLASHPACK_BAD_FILE if the file has no
/// checksums; FLASHPACK_FILE_CHANGED; errno.
flashpack_status flashpack_verify(flashpack_engine* engine, const flashpack_checkpoint* checkpoint, size_t index,
                                  flashpack_verify_report* report, flashpack_error** error);

/// A new file that will replace the one at its path when it is complete. One thread at a time may use a writer.
typedef struct flashpack_writer flashpack_writer;

typedef struct flashpack_writer_options {
  size_t struct_size;
  uint64_t payload_bytes;  ///< Least size, which is reserved at once, so that a full disk is an error in time; or 0.
  int32_t replace_link;    ///< If not 0, a symbolic link at the path is replaced; else the file that it points to.
  int32_t reserved;
} flashpack_writer_options;

/// Bytes in memory, and the place in the file that they go to.
typedef struct flashpack_source {
  uint64_t offset_bytes;
  uint64_t size_bytes;
  const void* source;  ///< Memory of the host or of a GPU of the engine.
} flashpack_source;

typedef struct flashpack_write_request {
  size_t struct_size;
  const flashpack_source* sources;  ///< No byte of a file may be written twice.
  size_t source_count;
  void* stream;        ///< A cudaStream_t: sources on a GPU are not read before all work that is on it has ended.
  int64_t timeout_ns;  ///< As in flashpack_load_request, like the rest.
  flashpack_events* events;
  uint64_t tag;
  void* const* more_streams;  ///< As in flashpack_load_request.
  size_t more_stream_count;
} flashpack_write_request;

/// Begins a file beside `path`, whose directory must exist. `options` may be NULL. Errors: FLASHPACK_INVALID_ARGUMENT,
/// also if something else than a regular file is at `path`; errno, EISDIR for a directory; FLASHPACK_UNUSABLE.
flashpack_status flashpack_writer_create(flashpack_engine* engine, const char* path,
                                         const flashpack_writer_options* options, flashpack_writer** writer,
                                         flashpack_error** error);
/// Starts a write and returns; may be called any number of times. Bytes that are never written read as zeros. Errors:
/// a byte twice; ENOSPC; others are the transfer's.
flashpack_status flashpack_start_write(flashpack_writer* writer, const flashpack_write_request* request,
                                       flashpack_transfer** transfer, flashpack_error** error);
/// Writes and returns when all bytes are in the new file.
flashpack_status flashpack_write(flashpack_writer* writer, const flashpack_write_request* request,
                                 flashpack_error** error);
/// Appends `tail_bytes` bytes, makes the file durable and puts it in place. All writes must have finished. After this
/// the writer can only be destroyed. Errors: that of a write that failed, FLASHPACK_INVALID_ARGUMENT if one is under
/// way or the writer was committed before, errno; the file at the path is as before, unless the message says that the
/// new file is in place but perhaps not durable.
flashpack_status flashpack_writer_commit(flashpack_writer* writer, const void* tail, size_t tail_bytes,
                                         flashpack_error** error);
/// Unless committed, cancels writes that are under way, removes the new file, and leaves what is at the path.
void flashpack_writer_destroy(flashpack_writer* writer);

/// A tensor to be saved.
typedef struct flashpack_save_tensor {
  const char* name;  ///< UTF-8.
  size_t name_bytes;
  const int64_t* shape;
  size_t dims;
  const void* data;  ///< Its elements in C order, in memory of the host or of a GPU of the engine.
  int32_t dtype;     ///< FLASHPACK_DTYPE_*.
  int32_t reserved;
} flashpack_save_tensor;

typedef struct flashpack_save_options {
  size_t struct_size;
  uint64_t align_bytes;  ///< Tensors begin at multiples of it. 0 is 128; 1 packs them densely.
  int32_t no_checksums;  ///< If not 0, the file gets no checksums.
  int32_t reserved;
  void* stream;  ///< As in flashpack_write_request, like the rest.
  void* const* more_streams;
  size_t more_stream_count;
} flashpack_save_options;

/// Writes a flashpack file with these tensors, all or nothing, and durable. Blocks. `options` may be NULL. Errors: no
/// tensors, names that are equal or not UTF-8, shapes and dtypes that cannot be; errno.
flashpack_status flashpack_save(flashpack_engine* engine, const char* path, const flashpack_save_tensor* tensors,
                                size_t tensor_count, const flashpack_save_options* options, flashpack_error** error);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
