/// The engine's threads. If the kernel keeps one of them, another takes its place.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace flashpack::internal {

/// An operation that takes longer than this is late. It keeps its memory, but the engine replaces its thread, its place
/// in the queue and its slot, so that others do not wait for it. A bound, and not tuned: disks answer in milliseconds,
/// and a replacement too many only costs a thread.
inline constexpr std::chrono::milliseconds kLate{500};

/// Runs tasks on a number of threads. A thread whose task is late is replaced, up to kMaxThreads in all. Queued tasks
/// of the same subject wait until the late task has returned, so that a file that does not answer does not take all
/// threads.
///
/// Thread safety: post(), set_free(), replace_late_threads() and thread_count() from any thread.
class Pool {
 public:
  /// Enough for all operations that can be stuck in a pipeline, for all parts that can be held up, and for others.
  static constexpr std::size_t kMaxThreads = 640;

  /// Names the file that the task works on, so that other tasks of the file wait if this one is late; 0 for none. The
  /// value must not pass to another file while the task runs, as the number of a descriptor does when the task closes
  /// it.
  using Subject = std::uint64_t;

  class Task;

 private:
  // Deletes a task that the pool owns, and leaves a borrowed one alone.
  struct Release {
    Release() noexcept : owns(false) {}
    Release(std::default_delete<Task>) noexcept : owns(true) {}
    void operator()(Task* task) const noexcept;
    bool owns;
  };
  // A task that has been posted. The queue is a list in which each task holds the next one, so that borrowed tasks, of
  // which there is one for each chunk, join it without an allocation.
  using Posted = std::unique_ptr<Task, Release>;

 public:
  class Task {
   public:
    virtual ~Task() = default;
    /// Called in a thread of the pool, once for each time that the task is posted.
    virtual void run() noexcept = 0;

    /// To be set before the task is posted.
    Subject subject = 0;

   private:
    friend class Pool;
    Posted next_;  // The next one in the queue.
  };

  /// Throws: std::system_error when threads cannot be had.
  explicit Pool(unsigned thread_count);
  /// Runs the tasks that have been posted. A thread is left behind if the pool owns its task and the task is late.
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  /// The number that was asked for, whatever threads are late or have been added.
  unsigned thread_count() const noexcept;

  /// Borrows the task until its run() has returned. Requires: it is not queued.
  void post(Task& task);
  /// Takes over the task, and deletes it in the thread that has run it. The pool may be destroyed before the task
  /// has ended, so the task must own, or share, all that it uses.
  void post(std::unique_ptr<Task> task);

  /// Lets a queued task run although another of its subject is late, because it will not touch the file any more.
  void set_free(Task& task);

  /// To be called about every kLate while tasks are queued or running.
  void replace_late_threads();

 private:
  struct State;
  void add(Posted task);
  void stop();
  std::shared_ptr<State> state_;  // Shared, because threads that are left behind outlive the pool.
};

}  // namespace flashpack::internal
