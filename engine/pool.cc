#include "engine/pool.h"

#include <algorithm>
#include <condition_variable>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "engine/thread.h"

namespace flashpack::internal {

using Clock = std::chrono::steady_clock;

struct Pool::State {
  struct Thread {
    std::thread handle;
    bool running = false;  // Whether it runs a task.
    Subject subject = 0;
    bool may_be_left = false;  // The pool owns the task.
    bool late = false;
    Clock::time_point since;
  };

  explicit State(unsigned count) : wanted(count) {}

  static void work(std::shared_ptr<State> state, std::list<Thread>::iterator self);
  /// Throws: std::system_error when the system has no more threads.
  void add_thread(const std::shared_ptr<State>& self);
  void replace_late(const std::shared_ptr<State>& self);
  /// Null if there is none.
  Posted take_runnable();
  bool surplus() const { return threads.size() - late > wanted; }
  /// Marks threads that have become late, and returns their number.
  std::size_t note_late();
  bool is_held_up(Subject subject) const;

  const unsigned wanted;

  std::mutex mutex;  // Protects the rest.
  std::condition_variable work_wanted;
  std::condition_variable thread_free;
  Posted first;  // The queue.
  Posted* end_of_queue = &first;
  std::list<Thread> threads;
  std::list<Thread> ended;  // Threads that are to be joined.
  std::size_t late = 0;
  bool stopping = false;
};

bool Pool::State::is_held_up(Subject subject) const {
  return late > 0 && subject != 0 && !stopping &&
         std::any_of(threads.begin(), threads.end(), [&](const Thread& t) { return t.late && t.subject == subject; });
}

void Pool::Release::operator()(Task* task) const noexcept {
  if (owns) std::default_delete<Task>()(task);
}

Pool::Posted Pool::State::take_runnable() {
  for (Posted* at = &first; *at; at = &(*at)->next_) {
    if (is_held_up((*at)->subject)) continue;
    Posted task = std::move(*at);
    *at = std::move(task->next_);
    if (end_of_queue == &task->next_) end_of_queue = at;
    return task;
  }
  return nullptr;
}

std::size_t Pool::State::note_late() {
  const auto now = Clock::now();
  std::size_t found = 0;
  for (Thread& thread : threads) {
    if (!thread.running || thread.late || now - thread.since < kLate) continue;
    thread.late = true;
    ++found;
  }
  late += found;
  return found;
}

void Pool::State::add_thread(const std::shared_ptr<State>& self) {
  const auto at = threads.emplace(threads.end());
  try {
    at->handle = start_thread("flashpack-work", [self, at] { work(self, at); });
  } catch (...) {
    threads.erase(at);
    throw;
  }
}

// Starts two threads for each that has just become late, so that many tasks that become late at once are through after
// a few rounds.
void Pool::State::replace_late(const std::shared_ptr<State>& self) {
  std::size_t missing = 2 * note_late();
  const std::size_t timely = threads.size() - late;
  if (timely < wanted) missing = std::max<std::size_t>(missing, wanted - timely);
  for (; first && missing > 0 && threads.size() < kMaxThreads; --missing) {
    try {
      add_thread(self);
    } catch (const std::system_error&) {
      return;  // The system has no more threads, so the others have to do.
    }
  }
}

void Pool::State::work(std::shared_ptr<State> state, std::list<Thread>::iterator self) {
  std::unique_lock lock(state->mutex);
  while (true) {
    Posted task = state->take_runnable();
    if (!task) {
      if (state->stopping ? !state->first : state->surplus()) break;
      state->work_wanted.wait(lock);
      continue;
    }
    self->running = true;
    self->subject = task->subject;
    self->may_be_left = task.get_deleter().owns;
    self->since = Clock::now();
    lock.unlock();
    task->run();
    task.reset();  // Here, because to delete it may block, too. A borrowed one may be gone, or be posted again.
    lock.lock();
    self->running = false;
    if (self->late) {
      self->late = false;
      --state->late;
      state->work_wanted.notify_all();  // Tasks of this subject can go on.
    }
    state->thread_free.notify_all();
  }
  state->ended.splice(state->ended.end(), state->threads, self);
  state->thread_free.notify_all();
}

Pool::Pool(unsigned thread_count) : state_(std::make_shared<State>(thread_count)) {
  std::unique_lock lock(state_->mutex);
  try {
    for (unsigned i = 0; i < thread_count; ++i) state_->add_thread(state_);
  } catch (...) {
    lock.unlock();
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  std::unique_lock lock(state_->mutex);
  state_->stopping = true;
  state_->work_wanted.notify_all();
  const auto stays = [](const State::Thread& thread) { return thread.late && thread.may_be_left; };
  const auto all_have_ended = [&] {
    return (!state_->first || state_->threads.size() >= kMaxThreads) &&
           std::all_of(state_->threads.begin(), state_->threads.end(), stays);
  };
  while (!all_have_ended()) {
    state_->thread_free.wait_for(lock, kLate);
    state_->replace_late(state_);
  }
  for (State::Thread& thread : state_->threads) thread.handle.detach();
  std::list<State::Thread> ended;
  ended.swap(state_->ended);
  lock.unlock();
  for (State::Thread& thread : ended) thread.handle.join();
}

unsigned Pool::thread_count() const noexcept { return state_->wanted; }

void Pool::post(Task& task) { add(Posted(&task)); }

void Pool::post(std::unique_ptr<Task> task) { add(std::move(task)); }

void Pool::add(Posted task) {
  {
    const std::lock_guard lock(state_->mutex);
    Posted* const end = state_->end_of_queue;
    state_->end_of_queue = &task->next_;
    *end = std::move(task);
  }
  state_->work_wanted.notify_one();
}

void Pool::set_free(Task& task) {
  {
    const std::lock_guard lock(state_->mutex);
    task.subject = 0;
  }
  state_->work_wanted.notify_all();
}

void Pool::replace_late_threads() {
  const std::lock_guard lock(state_->mutex);
  for (State::Thread& thread : state_->ended) thread.handle.join();
  state_->ended.clear();
  state_->replace_late(state_);
}

}  // namespace flashpack::internal
