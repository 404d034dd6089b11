/// The engine's threads, which go on with other work when the kernel keeps one of them.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace flashpack::internal {

/// How long an operation may take before the engine stops waiting for it with others in mind: it keeps its memory, but
/// its thread, its place in the queue depth and its slot are made up for.
inline constexpr std::chrono::milliseconds kLate{500};

/// Runs tasks on a number of threads. A thread whose task is late is replaced, up to kMaxThreads in all, and tasks that
/// would follow it into the same file wait until it is back, so that a file system that does not answer holds up the
/// tasks of its own files alone.
///
/// Thread safety: post(), set_free() and replace_late_threads() from any thread.
class Pool {
 public:
  /// Enough for all that a pipeline lets get stuck, files and operations, and for the rest to go on.
  static constexpr std::size_t kMaxThreads = 640;

  /// A task may get stuck in this: a descriptor that stays open until it is done, or else what nothing else can have as
  /// long as it takes. Zero: nothing.
  using Subject = std::uint64_t;

  class Task {
   public:
    virtual ~Task() = default;
    /// In a thread of the pool, once. The pool does not touch the task any more when this has returned.
    virtual void run() noexcept = 0;

    Subject subject = 0;
    /// Whether the pool may be destroyed while this runs, because it uses nothing but what it owns.
    bool may_be_left = false;

   private:
    friend class Pool;
    Task* next_ = nullptr;
  };

  /// Throws: std::system_error when threads cannot be had.
  explicit Pool(unsigned thread_count);
  /// Runs what has been posted. A thread whose task may be left and is late is left behind with it.
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  unsigned thread_count() const noexcept;

  /// Borrows the task until run() begins; from then on it is its own, and may delete itself.
  void post(Task& task);

  /// A task that is queued does not wait for others of its subject any more: it will not touch it.
  void set_free(Task& task);

  /// To be called about every kLate while tasks are out.
  void replace_late_threads();

 private:
  struct State;
  void stop();
  std::shared_ptr<State> state_;  // Threads that are left behind have a share.
};

}  // namespace flashpack::internal
