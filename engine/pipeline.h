/// The loop: chunks through slots and into place.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "engine/copier.h"
#include "engine/io_queue.h"
#include "engine/mounts.h"
#include "engine/pool.h"
#include "engine/transfer_state.h"
#include "engine/way.h"

namespace flashpack::internal {

/// Serves transfers: direct I/O by the queue of the file, everything that touches bytes with a CPU by the workers,
/// copies to and from a device by the copier. Each chunk goes the way that stands in the table of way.cc.
///
/// Files are opened when their turn comes, a bounded number at a time, and closed when their bytes are there, both by
/// threads of the pool: whatever may block in a file system stays away from the driver. Where little of a
/// file is wanted, all of it cached, the thread that opens it does the rest, too, and the driver sees no chunk of it.
/// An operation that the kernel does not give back is stuck: when it is late, or its transfer has failed and it is
/// abandoned. It keeps its memory and holds up its transfer, but no longer counts against the depth, and its slot is
/// made up for, so that others go on. kStuckLimit bounds what can be stuck; a file that has many of them gets no more
/// when half of that is used up, and a file system when three quarters are. Files do not count against those that may
/// be open at a time while something is late in their file system; of those one mount point has at most half of what
/// the others leave, and one directory a third, for a link may lead to another file system. The rest of its loads is
/// parked.
///
/// run() is called by one thread, the driver; it does no byte work, never blocks in a file system, and allocates
/// nothing per chunk.
class Pipeline final : public Driver {
 public:
  struct Limits {
    std::uint32_t queue_depth;   ///< Direct reads in flight, or writes, with those whose slots are being filled.
    std::uint32_t worker_depth;  ///< Of each kind of work, given to the workers at a time; enough that they stay busy
                                 ///< while the driver sleeps.
    std::uint32_t chunk_bytes;
    std::uint32_t slots;              ///< In use at a time, of those there are; the others stand in for stuck ones.
    std::uint32_t at_once_bytes = 0;  ///< A file's share of a load up to this is read where it is opened, if cached.
  };

  /// Operations that the kernel keeps, beyond those that are under way.
  static constexpr unsigned kStuckLimit = 256;
  /// Parts of transfers whose files are open at a time.
  static constexpr std::size_t kMaxOpenParts = 32;

  /// The tags that queues of such a pipeline must allow.
  static unsigned tag_limit(Limits limits);

  /// Borrows the queues, the pool, the copier and the slots' memory, which outlive it. Threads of the pool may still
  /// use the queues, the copier and the slots when it has ended: the pool goes before these. `copier` is null for an
  /// engine of the host.
  Pipeline(Queues queues, Pool& pool, Copier* copier, std::vector<std::span<std::byte>> slots, Limits limits);

  /// Any thread: hands a prepared transfer to the driver.
  void start(std::shared_ptr<TransferState> transfer);
  /// Any thread.
  void attend(std::shared_ptr<TransferState> transfer) noexcept override;
  /// Any thread: run() returns when all that was started has ended.
  void close() noexcept;

  /// True when all has ended after close(). False, once, when the disk's queue begins to refuse: what it has comes back
  /// after the end of the thread that made it, so that another thread is to call this again.
  bool run();

 private:
  using Route = ChunkTraits::Route;

  /// One chunk under way. Its index is the tag of its operations.
  struct Job {
    Part* part = nullptr;  // Null: it is free.
    const Chunk* chunk = nullptr;
    Way way;
    std::size_t next = 0;  // Of the way's steps, the one after `step`.
    Step step = Step::kFree;
    int slot = -1;
    SlotView view;                                // What the slot holds, or in place the target or source itself.
    std::uint64_t done_bytes = 0;                 // Whole blocks of the view that have been moved by direct I/O.
    unsigned stalls = 0;                          // Results in a row that moved no new block.
    Queue* queue = nullptr;                       // Has its operation.
    std::chrono::steady_clock::time_point since;  // It began its step.
    bool stuck = false;                           // Late or abandoned: not counted as in its step.
    bool late = false;

    TransferState& transfer() const { return *part->transfer; }
  };

  struct Answer {
    std::shared_ptr<TransferState> transfer;
    Part* part;
  };
  /// Other threads leave here what the driver is to know. A thread that is left behind in a file system outlives the
  /// pipeline.
  struct Inbox {
    void answer(std::shared_ptr<TransferState> transfer, Part& part) noexcept;

    std::mutex mutex;  // Protects the rest. Waking is done under it: the queue may be gone as soon as run() returns.
    Queue* sleeper = nullptr;  // The driver sleeps in it; null when it has left.
    std::vector<std::shared_ptr<TransferState>> started;
    std::shared_ptr<TransferState> cancelled;  // The first of a list.
    std::vector<Answer> answers;               // Parts whose threads are done with them.
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
  SlotView view_of(const Job& job, Route route) const;

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
  /// A file, or a file system, may have so much stuck in any case.
  std::uint32_t stuck_share() const { return std::min(limits_.queue_depth, limits_.slots); }
  /// Whether the rest is kept for others when so much is stuck in all: by a file that does not answer for the other
  /// files of its file system, by that for other ones.
  bool has_enough_stuck(const Part& part, std::size_t stuck, std::size_t of_files, std::size_t of_file_systems) const {
    return (part.open->stuck >= stuck_share() && stuck > of_files) ||
           (part.file_system->stuck >= stuck_share() && stuck > of_file_systems);
  }
  void set_stuck(Job& job);
  void clear_stuck(Job& job);
  void set_late(Job& job);
  /// Parts that are open, being opened or closed, and do not get on because a file system does not answer.
  std::size_t held_up_parts() const { return late_parts_ + held_up_parts_; }
  /// Jobs that are with the disk, or bound for it with a slot.
  std::uint32_t depth() { return jobs_in(Step::kRead) + jobs_in(Step::kWrite) + jobs_in(Step::kGather); }
  /// Jobs that move bytes through the page cache.
  std::uint32_t buffered() {
    return jobs_in(Step::kReadIfCached) + jobs_in(Step::kReadCached) + jobs_in(Step::kWriteCached);
  }
  /// Where the bytes are counted in the step that it is in; null when they are not.
  static StripeSums* sums_of(const Job& job) { return job.step == job.way.counts_in ? &*job.part->sums : nullptr; }
  static std::span<const Fragment> fragments_of(const Job& job) { return job.part->plan.fragments_of(*job.chunk); }

  const Queues queues_;
  Pool& pool_;
  Copier* const copier_;
  const std::vector<std::span<std::byte>> slots_;
  const Limits limits_;
  const std::shared_ptr<FileTable> files_ = std::make_shared<FileTable>();
  const std::shared_ptr<Inbox> inbox_;
  std::map<std::uint64_t, FileSystem> file_systems_;  // By device number. They stay; there are few.

  std::vector<Job> jobs_;
  std::vector<unsigned> free_jobs_;
  std::vector<int> free_slots_;                  // Last in, first out: few slots are ever touched when few are needed.
  std::array<std::uint32_t, kSteps> jobs_in_{};  // Those that are not stuck.
  std::uint32_t stuck_jobs_ = 0;
  std::uint32_t stuck_slots_ = 0;
  std::chrono::steady_clock::time_point now_;  // Of this turn of the loop.
  std::chrono::steady_clock::time_point looked_for_stuck_;

  std::size_t unfinished_ = 0;  // Transfers.
  std::uint64_t next_turn_ = 0;
  std::map<std::uint64_t, Part*> waiting_;              // To be opened, by turn.
  std::map<std::uint64_t, Part*> parked_;               // Those of them whose places have their share of what is stuck.
  bool look_at_parked_ = false;                         // Something has come back.
  std::array<std::map<std::string, Place>, 2> places_;  // Directories, mount points. They stay; there are few.
  Mounts mounts_;                                       // As they were when something became late, at:
  std::chrono::steady_clock::time_point mounts_read_;
  std::vector<Part*> with_threads_;  // Being opened or closed.
  static constexpr std::size_t kSmall = 0;
  static constexpr std::size_t kLarge = 1;
  std::array<std::vector<Part*>, 2> issuing_;  // Have chunks to issue; each in the order of their turns.
  std::size_t open_parts_ = 0;                 // Of loads, from the opening to the closing.
  std::size_t late_parts_ = 0;                 // Of these: not answered for.
  std::size_t held_up_parts_ = 0;              // Of these: open, and something is late in their file system.
  std::size_t max_open_parts_ = kMaxOpenParts;
  std::set<std::pair<Deadline, TransferState*>> deadlines_;
  std::vector<TransferState*> gated_;                     // Behind a gate.
  std::chrono::steady_clock::time_point gates_changed_;   // When the last of them came, or went.
  std::vector<std::shared_ptr<TransferState>> admitted_;  // Scratch of admit().
  std::vector<Answer> answered_;                          // The same.
};

}  // namespace flashpack::internal
