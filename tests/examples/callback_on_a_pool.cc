// Is told of the end of a load on a thread of its own pool. The class that does it, and its use, are in
// engine/README.md, "Ways to wait", from where the build takes them. Exits with 0 if a load and an error arrive there.
#include <flashpack/engine.h>
#include <flashpack/transfer.h>

#include <condition_variable>
#include <cstdio>
#include <deque>
#include <exception>
#include <functional>
#include <future>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "tests/examples/temp_folder.h"

namespace {

/// Stands for the executor of a runtime: a thread that runs what is posted, in order.
class Pool {
 public:
  void post(std::function<void()> work) {
    {
      const std::lock_guard lock(mutex_);
      works_.push_back(std::move(work));
    }
    posted_.notify_one();
  }

  std::thread::id thread_id() const { return thread_.get_id(); }

 private:
  void run(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (posted_.wait(lock, stop, [&] { return !works_.empty(); })) {
      const std::function<void()> work = std::move(works_.front());
      works_.pop_front();
      lock.unlock();
      work();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable_any posted_;
  std::deque<std::function<void()>> works_;
  std::jthread thread_{[this](const std::stop_token& stop) { run(stop); }};  // Last: it uses the others.
};

#include "readme_callback.h"

// Returns how the load has ended.
std::error_code load(flashpack::Engine& engine, Pool& pool, const flashpack::LoadRequest& request) {
  std::promise<std::error_code> loaded;
  const auto on_loaded = [&](std::error_code error) {
    if (std::this_thread::get_id() == pool.thread_id()) return loaded.set_value(error);
    loaded.set_exception(std::make_exception_ptr(std::logic_error("not on the pool")));
  };
#include "readme_callback_use.h"
  return loaded.get_future().get();
}

}  // namespace

int main() try {
  std::vector<unsigned> numbers(1 << 20);
  std::iota(numbers.begin(), numbers.end(), 0u);
  const TempFolder folder;
  const auto path = folder.write<unsigned>("numbers", numbers);
  std::vector<unsigned> memory(numbers.size());
  const flashpack::Extent extent{.size_bytes = memory.size() * sizeof(unsigned), .target = memory.data()};

  flashpack::Engine engine;
  Pool pool;
  const std::error_code error = load(engine, pool, {.files = {{.path = path, .extents = {extent}}}});
  const std::error_code missing =
      load(engine, pool, {.files = {{.path = path.string() + "-not", .extents = {extent}}}});
  std::printf("%s; %s\n", error.message().c_str(), missing.message().c_str());
  return !error && memory == numbers && missing == std::errc::no_such_file_or_directory ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "callback_on_a_pool: %s\n", error.what());
  return 1;
}
