/// Moves the chunks of all transfers on their ways.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "engine/copier.h"
#include "engine/mounts.h"
#include "engine/pool.h"
#include "engine/transfer_state.h"
#include "engine/way.h"
#include "engine/work_queue.h"

namespace flashpack::internal {

/// The queues of one pipeline; they outlive it.
struct Queues {
  DiskQueue& disk;      ///< Serves files. The driver sleeps in its wait(), and the other queues wake it.
  DiskQueue& stand_in;  ///< Serves files when `disk` refuses; may be `disk` itself.
  WorkQueue& workers;
};

/// Serves transfers. The file's queue does the direct I/O, the workers do all work that touches bytes with a CPU, and
/// the copier copies to and from a device. Each chunk goes the way that the table in way.cc gives.
///
/// Threads of the pool open a file when its turn comes, a bounded number at a time, and close it when its bytes have
/// been moved, because both may block in the file system. If little of a file is wanted and all of it is cached, the
/// thread that opens the file reads it, too, and the driver sees no chunk of it.
///
/// An operation is stuck if it is late, or if its transfer has failed and the operation is abandoned. A stuck operation
/// keeps its memory and holds up its transfer. It does not count against the queue depth, and a spare slot takes the
/// place of its slot, so that other transfers go on. At most kStuckLimit operations can be stuck. When half of these
/// are, a file with many of them gets no more, and when three quarters are, a file system with many of them gets no
/// more.
///
/// While something is late in a file system, its files do not count against the files that may be open at a time. One
/// mount point gets at most half of what the others leave of kStuckLimit for such files, and one directory a third,
/// because a link may lead to another file system. Further loads from there are parked.
///
/// One thread, the driver, calls run(). It does no byte work, never blocks in a file system, and allocates nothing per
/// chunk.
class Pipeline final : public Driver {
 public:
  struct Limits {
    std::uint32_t queue_depth;   ///< Direct reads and writes in flight, including chunks whose slots are being filled.
    std::uint32_t worker_depth;  ///< Operations of each kind that the workers have at a time; enough to keep them busy
                                 ///< while the driver sleeps.
    std::uint32_t chunk_bytes;
    std::uint32_t slots;  ///< Slots in use at a time; further slots take the place of stuck ones.
    /// A part of at most this size is read by the thread that opens its file, if cached.
    std::uint32_t at_once_bytes = 0;
  };

  /// Stuck operations, in addition to those that are in flight.
  static constexpr unsigned kStuckLimit = 256;
  /// Parts whose files are open at a time.
  static constexpr std::size_t kMaxOpenParts = 32;

  /// The tag limit that the queues of such a pipeline need.
  static unsigned tag_limit(Limits limits);

  /// Borrows the queues, the pool, the copier and the slots' memory, which must outlive it. Threads of the pool may use
  /// queues, copier and slots even later, so the pool must be destroyed before these. `copier` is null for an engine of
  /// the host.
  Pipeline(Queues queues, Pool& pool, Copier* copier, std::vector<std::span<std::byte>> slots, Limits limits);

  /// Any thread: hands a prepared transfer to the driver.
  void start(std::shared_ptr<TransferState> transfer);
  /// Any thread: tells the driver that the transfer was cancelled.
  void attend(std::shared_ptr<TransferState> transfer) noexcept override;
  /// Any thread: lets run() return when all transfers have ended.
  void close() noexcept;

  /// Returns true when all transfers have ended after close(). Returns false once, if the disk's queue begins to
  /// refuse: its operations come back only after the thread that made the queue has ended, so another thread must call
  /// run() again.
  bool run();

 private:
  using Route = ChunkTraits::Route;

  /// One chunk under way. The job's index is the tag of its operations.
  struct Job {
    Part* part = nullptr;  // Null if the job is free.
    const Chunk* chunk = nullptr;
    Way way;
    std::size_t next = 0;  // Index in the way of the step after `step`.
    Step step = Step::kFree;
    int slot = -1;
    SlotView view;                                // The bytes in the slot or, in place, in the caller's memory.
    Fragment file_bytes{};                        // The range of the file that they are read from or written to.
    std::uint64_t done_bytes = 0;                 // Bytes of it that direct I/O has moved, in whole blocks.
    unsigned stalls = 0;                          // Results in a row that moved no further block.
    Queue* queue = nullptr;                       // The queue that has the job's operation.
    std::chrono::steady_clock::time_point since;  // When the step began.
    bool stuck = false;                           // Late or abandoned; not counted in jobs_in_.
    bool late = false;

    TransferState& transfer() const { return *part->transfer; }
  };

  struct Answer {
    std::shared_ptr<TransferState> transfer;
    Part* part;
  };
  /// Other threads leave messages to the driver here. It is shared, because a thread that is left behind outlives the
  /// pipeline.
  struct Inbox {
    void answer(std::shared_ptr<TransferState> transfer, Part& part) noexcept;

    // Protects the rest. Wakes happen under it, because the queue may be gone when run() has returned.
    std::mutex mutex;
    Queue* sleeper = nullptr;  // The queue that the driver sleeps in; null when run() has ended.
    std::vector<std::shared_ptr<TransferState>> started;
    std::shared_ptr<TransferState> cancelled;  // The first of a linked list.
    std::vector<Answer> answers;               // Parts whose threads have finished with them.
    bool closing = false;
  };
  class FileTask;
  class CloseTask;

  // The loop: pipeline.cc.
  bool finished();
  std::optional<std::chrono::nanoseconds> patience(bool look_again);
  void reap(std::optional<std::chrono::nanoseconds> patience);
  void complete_all(std::span<const IoCompletion> completions);
  void look_for_stuck();
  void attend_to_gates();
  bool issue();
  void issue_from(Part& part, unsigned& questions, std::uint32_t queue_depth);
  bool set_out(Part& part, const Chunk& chunk, Route route);
  static ChunkTraits traits_of(const Part& part, const Chunk& chunk, Route route);
  void set_view(Job& job) const;

  // Transfers and their parts: pipeline_parts.cc.
  void admit();
  void admit(const std::shared_ptr<TransferState>& started);
  void expire();
  void open_next();
  std::array<Place*, 2> places_of(const Part& part);
  bool has_share(const Place& place, unsigned shares) const;
  bool is_to_be_parked(Part& part);
  void enter_places(Part& part);
  void leave_places(Part& part);
  void ask(Part& part, Part::State state);
  void on_answer(Part& part);
  void on_opened(Part& part);
  void begin_issuing(Part& part);
  void issue_from_now_on(Part& part);
  std::vector<Part*>& issuing_like(const Part& part);
  void on_delivered(Part& part);
  void stop_waiting_for(Part& part);
  static void report_at_once(const Part& part);
  bool report_landed(Part& part, const Chunk& chunk);
  void look_for_late_parts();
  void set_late(Part& part);
  void read_mounts();
  void give_up(TransferState& transfer, const Error& error);
  void settle(TransferState& transfer);
  void end(TransferState& transfer);

  // The steps of one chunk: pipeline_steps.cc.
  unsigned open_job(Part& part, const Chunk& chunk);
  std::optional<unsigned> open_job_with_slot(Part& part, const Chunk& chunk);
  void begin(unsigned tag, Step step);
  void advance(unsigned tag);
  DiskQueue& queue_of(OpenFile& file) const;
  void move_direct(unsigned tag);
  void move_buffered(unsigned tag);
  void give_to_workers(unsigned tag, ByteWork work);
  void populate(unsigned tag);
  void copy(unsigned tag);
  void complete(IoCompletion completion);
  void on_direct(unsigned tag, std::int64_t result);
  void on_buffered(unsigned tag, std::int64_t result);
  void on_worked(unsigned tag, std::error_code error);
  void refuse_direct(unsigned tag);
  void deliver(unsigned tag);
  void give_back(unsigned tag);
  void fail(unsigned tag, std::error_code code);
  void abandon_jobs_of(TransferState& transfer);
  void close_job(unsigned tag);

  std::uint32_t& jobs_in(Step step) { return jobs_in_[static_cast<std::size_t>(step)]; }
  void enter(Job& job, Step step);
  /// The number of stuck operations that each file, and each file system, may have in any case.
  std::uint32_t stuck_share() const { return std::min(limits_.queue_depth, limits_.slots); }
  /// Whether the part may get no more stuck operations when `stuck` are stuck in all. From `of_files` on, a file with
  /// many of them leaves the rest to other files; from `of_file_systems` on, a file system leaves the rest to others.
  bool has_enough_stuck(const Part& part, std::size_t stuck, std::size_t of_files, std::size_t of_file_systems) const {
    return (part.open->stuck >= stuck_share() && stuck > of_files) ||
           (part.file_system->stuck >= stuck_share() && stuck > of_file_systems);
  }
  void set_stuck(Job& job);
  void clear_stuck(Job& job);
  void set_late(Job& job);
  /// Parts that are open, or being opened or closed, while their file system does not answer.
  std::size_t held_up_parts() const { return late_parts_ + held_up_parts_; }
  /// Jobs that the disk has, or that are filling a slot for it.
  std::uint32_t depth() { return jobs_in(Step::kRead) + jobs_in(Step::kWrite) + jobs_in(Step::kGather); }
  /// Jobs that move bytes through the page cache.
  std::uint32_t buffered() {
    return jobs_in(Step::kReadIfCached) + jobs_in(Step::kReadCached) + jobs_in(Step::kWriteCached);
  }
  /// Where the current step counts the job's bytes; null if it does not.
  static StripeSums* sums_of(const Job& job) { return job.step == job.way.counts_in ? &*job.part->sums : nullptr; }
  static std::span<const Fragment> fragments_of(const Job& job) { return job.part->plan.fragments_of(*job.chunk); }
  /// Returns the ranges that a worker moves between file and memory: of a job in place, those of the caller.
  static std::span<const Fragment> cached_io_of(const Job& job) {
    return job.way.view == View::kFragments ? fragments_of(job) : std::span(&job.file_bytes, 1);
  }

  const Queues queues_;
  Pool& pool_;
  Copier* const copier_;
  const std::vector<std::span<std::byte>> slots_;
  const Limits limits_;
  const std::shared_ptr<FileTable> files_;
  const std::shared_ptr<Inbox> inbox_;
  std::map<std::uint64_t, FileSystem> file_systems_;  // One for each device number; never removed.

  std::vector<Job> jobs_;
  std::vector<unsigned> free_jobs_;
  std::vector<int> free_slots_;  // Last in, first out, so that no more slots are touched than are needed.
  std::array<std::uint32_t, kSteps> jobs_in_{};  // For each step, its jobs that are not stuck.
  std::uint32_t stuck_jobs_ = 0;
  std::uint32_t stuck_slots_ = 0;
  std::chrono::steady_clock::time_point now_;  // Time at the start of this turn of the loop.
  std::chrono::steady_clock::time_point looked_for_stuck_;

  std::size_t unfinished_ = 0;  // Transfers that have not ended.
  std::uint64_t next_turn_ = 0;
  std::map<std::uint64_t, Part*> waiting_;              // Parts to be opened, sorted by turn.
  std::map<std::uint64_t, Part*> parked_;               // Parts to be opened whose places have used up their share.
  bool look_at_parked_ = false;                         // Something that was late has come back.
  std::array<std::map<std::string, Place>, 2> places_;  // Directories and mount points; never removed.
  Mounts mounts_;                                       // The mount points when something last became late.
  std::chrono::steady_clock::time_point mounts_read_;
  std::vector<Part*> with_threads_;  // Parts that are being opened or closed.
  static constexpr std::size_t kSmall = 0;
  static constexpr std::size_t kLarge = 1;
  std::array<std::vector<Part*>, 2> issuing_;  // Parts with chunks to issue, sorted by turn.
  std::size_t open_parts_ = 0;                 // Parts of loads, from opening to closing.
  std::size_t late_parts_ = 0;                 // Those of them whose threads are late.
  std::size_t held_up_parts_ = 0;  // Those of them that are open and have something late in their file system.
  std::size_t max_open_parts_ = kMaxOpenParts;
  std::set<std::pair<Deadline, TransferState*>> deadlines_;
  std::vector<TransferState*> gated_;                     // Transfers with a gate.
  std::chrono::steady_clock::time_point gates_changed_;   // When a transfer was last added or removed.
  std::vector<std::shared_ptr<TransferState>> admitted_;  // Used in admit() only.
  std::vector<Answer> answered_;                          // Used in admit() only, too.
};

}  // namespace flashpack::internal
