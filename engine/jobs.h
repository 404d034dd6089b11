/// The chunks that are under way, and which part may have one more.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "engine/byte_work.h"
#include "engine/io_queue.h"
#include "engine/part.h"
#include "engine/tracer.h"
#include "engine/way.h"

namespace flashpack::internal {

/// One chunk under way.
struct Job {
  Part* part = nullptr;  // Null if the job is free.
  const Chunk* chunk = nullptr;
  Way way;
  std::size_t next = 0;  // The step after `step`, as an index in `way.steps`.
  Step step = Step::kFree;
  int slot = -1;
  ChunkView view;                               // The bytes in the slot or, in place, in the caller's memory.
  Fragment file_bytes{};                        // The bytes of `view` as a range of the file.
  std::uint64_t done_bytes = 0;                 // Bytes of file_bytes that direct I/O has moved; while it is not at
                                                // the end, in whole disk blocks.
  unsigned stalls = 0;                          // Results in a row that moved no further disk block.
  Queue* queue = nullptr;                       // The queue that has the job's operation.
  std::chrono::steady_clock::time_point since;  // When the step began.
  std::uint64_t begun_bytes = 0;                // `done_bytes` at that time.
  bool stuck = false;                           // The operation is late or abandoned.
  bool late = false;                            // The operation has taken longer than kLate.

  TransferState& transfer() const { return *part->transfer; }
  std::span<const Fragment> fragments() const { return part->plan().fragments_of(*chunk); }
  /// The operation of kRead or kWrite, from the last whole disk block on that has been moved.
  DiskRequest disk_request() const;
  /// The operation of a step in which a CPU or the copier touches the bytes. Valid as long as the job stays in its
  /// place.
  ByteWork byte_work() const;
};

/// The way of a chunk of `part` on that route.
Way way_of(const Part& part, const Chunk& chunk, ChunkTraits::Route route);

/// The jobs of a pipeline and their slots. A job's tag, which is its index, names its operation in the queues.
///
/// A job is stuck while its operation is late or abandoned. It may keep its memory for ever, and other transfers must
/// not wait for it. Therefore a stuck job does not count among the jobs of its step, so that another operation can
/// start in its place, and its slot does not count among the slots in use, so that a spare slot can take its place.
/// There are tags for kStuckLimit stuck jobs, in addition to those for jobs that go on.
///
/// One file system that does not answer must not use up these tags and the spare slots, because then nothing else could
/// be loaded. Therefore a file that has many stuck jobs gets no further job when more than half of kStuckLimit is used,
/// which leaves the other half to other files. A file system that has many gets no further job when more than three
/// quarters are used. "Many" are as many as could be under way if nothing were stuck: the queue depth or the number of
/// slots, whichever is smaller. Spare slots are shared out in the same way. A copy that is late in the caller's memory,
/// which may be a map of a file elsewhere, does not count against the file and its file system, but against its
/// transfer, which has the share of a file. An engine of a device has no spare slots. With four slots or more, each
/// file system there leaves a quarter of those that it finds to others.
///
/// open(), enter(), reroute() and close() are a job's life, mark_late() looks after all jobs, and the other functions
/// ask.
///
/// Thread safety: one thread. Only the constructor allocates.
class Jobs {
 public:
  using Time = std::chrono::steady_clock::time_point;

  /// Stuck jobs for which there are tags.
  static constexpr unsigned kStuckLimit = 256;

  struct Limits {
    unsigned tags;
    std::uint32_t queue_depth;
    std::uint32_t slots;  ///< Slots in use at a time; the other ones are spare.
  };

  /// Borrows the memory of the slots, and who is told of the steps.
  Jobs(Limits limits, std::vector<std::span<std::byte>> slots, Tracer tracer = {});

  Job& operator[](std::size_t tag) { return jobs_[tag]; }
  /// Each tag is below it.
  std::size_t size() const noexcept { return jobs_.size(); }
  bool none_free() const noexcept { return free_.empty(); }
  /// Whether no chunk is under way.
  bool idle() const;
  /// The number of jobs in `step` that are not stuck.
  std::uint32_t in(Step step) const { return in_[static_cast<std::size_t>(step)]; }

  /// False if the part's file or file system has its share of the stuck jobs, so that no further chunk of it may start.
  bool may_have_more(const Part& part) const;
  /// Whether some pages of the next slot that open() takes may be fresh, because no read of as many bytes as the chunk
  /// has went to it. False for chunks of less than a huge page, because the way to a worker and back takes longer than
  /// most of their page faults.
  bool next_slot_is_fresh(const Chunk& chunk) const;
  /// Starts a job, with a slot if its way needs one. Returns its tag, or nothing if there is no tag, or no slot for
  /// this part, now.
  std::optional<unsigned> open(Part& part, const Chunk& chunk, const Way& way);
  /// Lets the job go `way` from its beginning. Its slot is freed if the way needs none. Requires: the way needs no slot
  /// if the job has none.
  void reroute(Job& job, const Way& way);
  /// The job begins `step`, and is not stuck any more; in kAbandoned it is stuck from the start.
  void enter(Job& job, Step step, Time now);
  /// Finds the operations that have become late. Returns whether there are any.
  bool mark_late(Time now);
  /// Frees the job and its slot.
  void close(unsigned tag, Time now);

 private:
  void tell_of_end(const Job& job, Step next, Time now) const;
  bool has_its_share_of_slots(const FileSystem& file_system) const;
  std::optional<int> take_slot(const Part& part);
  void give_back_slot(Job& job);
  void set_view(Job& job) const;
  void set_stuck(Job& job);
  void clear_stuck(Job& job);
  bool has_enough_stuck(const Part& part, std::size_t used, std::size_t of_files, std::size_t of_file_systems) const;

  const Limits limits_;
  const Tracer tracer_;
  const std::vector<std::span<std::byte>> slots_;
  std::vector<Job> jobs_;
  std::vector<unsigned> free_;
  std::vector<std::uint64_t> used_bytes_;  // The most bytes that each slot has been read to.
  std::vector<int> free_slots_;            // Last in, first out, so that no more slots are touched than are needed.
  std::array<std::uint32_t, kSteps> in_{};
  std::uint32_t stuck_ = 0;
  std::uint32_t stuck_slots_ = 0;
};

}  // namespace flashpack::internal
