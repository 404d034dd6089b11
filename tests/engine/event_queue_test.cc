#include "flashpack/event_queue.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <future>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "engine/ground/unique_fd.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/plug.h"
#include "tests/support/sandbox.h"
#include "tests/support/sanitizers.h"
#include "tests/support/small_loads.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kHang;
using testing::Plug;

bool is_readable(int fd, std::chrono::milliseconds wait = {}) {
  pollfd polled{.fd = fd, .events = POLLIN, .revents = 0};
  return ::poll(&polled, 1, static_cast<int>(wait.count())) == 1;
}

// Takes events, `at_a_time`, until `transfers` of them are of ends.
std::vector<Event> take_until_done(EventQueue& queue, std::size_t transfers, std::size_t at_a_time = 16) {
  std::vector<Event> all;
  std::vector<Event> some(at_a_time);
  for (std::size_t done = 0; done < transfers;) {
    if (!is_readable(queue.fd(), kHang)) throw std::runtime_error("no event comes");
    for (const Event& event : std::span(some).first(queue.take(some))) {
      done += event.kind == Event::Kind::kDone;
      all.push_back(event);
    }
  }
  return all;
}

std::vector<std::uint64_t> tags_of(const std::vector<Event>& events) {
  std::vector<std::uint64_t> tags;
  for (const Event& event : events) tags.push_back(event.tag);
  return tags;
}

// How often the queue has been written to since its descriptor was last drained.
std::string writes_to(const EventQueue& queue) {
  std::ifstream in("/proc/self/fdinfo/" + std::to_string(queue.fd()));
  for (std::string word; in >> word;) {
    if (word == "eventfd-count:" && in >> word) return word;
  }
  return "not an eventfd";
}

class EventQueueTest : public ::testing::Test {
 protected:
  static constexpr std::size_t kPieceBytes = 4096;

  EventQueueTest() { testing::write_file(path_, bytes_); }

  LoadRequest whole() { return testing::request(path_, memory_); }
  LoadRequest piece(std::size_t index) {
    const std::size_t at = index * kPieceBytes % bytes_.size();
    return {.files = {{.path = path_, .extents = {{at, kPieceBytes, memory_.data() + at}}}}};
  }
  LoadRequest missing() { return {.files = {{.path = dir_ / "none"}}}; }
  LoadRequest wrong() { return {.files = {{.path = path_, .extents = {{0, 5, nullptr}}}}}; }
  bool right() const { return testing::right(memory_, bytes_); }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::vector<std::byte> bytes_ = testing::random_bytes(5 << 20);
  GuardedMemory memory_{bytes_.size()};
  std::array<Event, 8> some_;
  Engine engine_{testing::small_engine()};
  EventQueue queue_;
};

TEST_F(EventQueueTest, AnEpollLoopIsToldOfLoadsAndWrites) {
  const internal::UniqueFd loop(::epoll_create1(EPOLL_CLOEXEC));
  epoll_event wanted{.events = EPOLLIN, .data = {.u64 = 5}};
  ASSERT_EQ(::epoll_ctl(loop.get(), EPOLL_CTL_ADD, queue_.fd(), &wanted), 0);
  FileWriter writer = engine_.create(dir_ / "copy");
  const Transfer load = queue_.start_load(engine_, whole(), 1);
  const Transfer write = queue_.start_write(writer, {.extents = {{0, bytes_.size(), bytes_.data()}}}, 2);
  std::vector<std::uint64_t> tags;
  while (tags.size() < 2) {
    epoll_event got{};
    ASSERT_EQ(::epoll_wait(loop.get(), &got, 1, static_cast<int>(std::chrono::milliseconds(kHang).count())), 1);
    ASSERT_EQ(got.data.u64, 5u);
    for (const Event& event : std::span(some_).first(queue_.take(some_))) {
      EXPECT_EQ(event.kind, Event::Kind::kDone);
      EXPECT_FALSE(event.error) << event.error.message();
      tags.push_back(event.tag);
    }
  }
  std::ranges::sort(tags);
  EXPECT_EQ(tags, (std::vector<std::uint64_t>{1, 2}));
  EXPECT_TRUE(right());
  writer.commit();
  EXPECT_TRUE(testing::file_has(dir_ / "copy", bytes_));
}

TEST_F(EventQueueTest, AThousandLoadsEndOnceEach) {
  std::vector<std::uint64_t> expected(1000);
  std::iota(expected.begin(), expected.end(), 0u);
  std::vector<Transfer> loads;
  for (const std::uint64_t tag : expected) loads.push_back(queue_.start_load(engine_, piece(tag), tag));
  std::vector<std::uint64_t> tags = tags_of(take_until_done(queue_, loads.size()));
  std::ranges::sort(tags);
  EXPECT_EQ(tags, expected);
  EXPECT_EQ(queue_.take(some_), 0u);
}

// The driver shares this thread's CPU and gives way to it, so that the end is taken before the driver goes on.
TEST_F(EventQueueTest, ATransferHasFinishedForEveryThreadOnceItsEndWasTaken) {
  struct Yielding final : Completion {
    void done(Transfer&) noexcept override {
      ::sched_setaffinity(0, sizeof cpu, &cpu);
      const sched_param none{};
      ::sched_setscheduler(0, SCHED_IDLE, &none);
    }
    cpu_set_t cpu{};
  } yielding;
  CPU_SET(static_cast<unsigned>(::sched_getcpu()), &yielding.cpu);
  ::sched_setaffinity(0, sizeof yielding.cpu, &yielding.cpu);
  engine_.start_load({}, &yielding).wait();
  for (std::size_t i = 0; i < 200; ++i) {
    const Transfer load = queue_.start_load(engine_, piece(i), i);
    take_until_done(queue_, 1);
    ASSERT_TRUE(load.progress().finished) << "load " << i;
  }
}

TEST_F(EventQueueTest, ExtentsLandBeforeTheEndOfTheirLoad) {
  LoadRequest request{.report_extents = true};
  const std::size_t size = bytes_.size() / 2;
  for (std::size_t file = 0; file < 2; ++file) {
    request.files.push_back({.path = path_});
    for (std::size_t at = file * size; at < (file + 1) * size; at += size / 5)
      request.files.back().extents.push_back({at, size / 5, memory_.data() + at});
  }
  const Transfer load = queue_.start_load(engine_, request, 9);
  std::vector<Event> events = take_until_done(queue_, 1, 3);
  EXPECT_EQ(events.back().kind, Event::Kind::kDone);
  events.pop_back();
  std::vector<std::pair<std::size_t, std::size_t>> landed;
  for (const Event& event : events) {
    EXPECT_EQ(event.kind, Event::Kind::kLanded);
    EXPECT_EQ(event.tag, 9u);
    landed.emplace_back(event.file, event.extent);
  }
  std::ranges::sort(landed);
  std::vector<std::pair<std::size_t, std::size_t>> expected;
  for (std::size_t file = 0; file < 2; ++file) {
    for (std::size_t extent = 0; extent < request.files[file].extents.size(); ++extent)
      expected.emplace_back(file, extent);
  }
  EXPECT_EQ(landed, expected);
  EXPECT_TRUE(right());
}

TEST_F(EventQueueTest, AFailedLoadSaysWhy) {
  Transfer load = queue_.start_load(engine_, missing(), 3);
  const std::vector<Event> events = take_until_done(queue_, 1);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].error, std::errc::no_such_file_or_directory);
  EXPECT_EQ(load.error_text(), "open " + (dir_ / "none").string() + ": No such file or directory");
  EXPECT_THROW(load.wait(), Error);
}

TEST_F(EventQueueTest, ALoadOfWhichOneFileHasFailedSaysWhy) {
  LoadRequest request = whole();
  request.files.insert(request.files.begin(), missing().files.front());
  request.report_extents = request.continue_on_error = true;
  const Transfer load = queue_.start_load(engine_, request, 3);
  const std::vector<Event> events = take_until_done(queue_, 1);
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].kind, Event::Kind::kLanded);
  EXPECT_EQ(events[0].file, 1u);
  EXPECT_EQ(events[1].error, std::errc::no_such_file_or_directory);
  ASSERT_EQ(load.file_errors().size(), 1u);
  EXPECT_EQ(load.file_errors().front().file, 0u);
  EXPECT_TRUE(right());
}

TEST_F(EventQueueTest, ACancelledLoadSaysSo) {
  Plug plug(engine_);
  Transfer load = queue_.start_load(engine_, whole(), 3);
  load.cancel();
  EXPECT_FALSE(is_readable(queue_.fd()));
  plug.pull();
  const std::vector<Event> events = take_until_done(queue_, 1);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].error, Errc::kCancelled);
  load.cancel();
  EXPECT_EQ(queue_.take(some_), 0u) << "a transfer that has finished is not affected";
}

TEST_F(EventQueueTest, ADetachedLoadIsToldOf) {
  queue_.start_load(engine_, whole(), 4).detach();
  queue_.start_load(engine_, missing(), 5).detach();
  for (const Event& event : take_until_done(queue_, 2)) {
    const std::error_code none;
    EXPECT_EQ(event.error, event.tag == 4 ? none : std::make_error_code(std::errc::no_such_file_or_directory));
  }
  EXPECT_TRUE(right());
}

TEST_F(EventQueueTest, TransfersGoOnWithoutTheQueueThatTheyWereStartedBy) {
  for (const bool detached : {false, true}) {
    auto queue = std::make_unique<EventQueue>();
    Plug plug(engine_);
    LoadRequest request = whole();
    request.report_extents = true;
    Transfer load = queue->start_load(engine_, request, 1);
    Transfer other = queue->start_load(engine_, missing(), 2);
    if (detached) other.detach();
    const int fd = queue->fd();
    queue.reset();
    EXPECT_EQ(::fcntl(fd, F_GETFD), -1) << "it is closed although transfers are under way";
    plug.pull();
    load.wait();
    EXPECT_TRUE(right());
  }
}

TEST_F(EventQueueTest, AQueueMayGoWithEventsInItAndAnEngineBeforeItsEvents) {
  {
    EventQueue queue;
    Engine engine(testing::small_engine());
    queue.start_load(engine, whole(), 1).wait();
    EXPECT_TRUE(is_readable(queue.fd()));
  }
  {
    std::optional<Engine> engine(testing::small_engine());
    queue_.start_load(*engine, whole(), 2).detach();
    engine.reset();
  }
  EXPECT_EQ(tags_of(take_until_done(queue_, 1)), std::vector<std::uint64_t>{2});
  EXPECT_TRUE(right());
}

TEST_F(EventQueueTest, TheOldestEventComesFirst) {
  std::vector<std::uint64_t> tags{5, 3, 9, 3, 1};
  for (const std::uint64_t tag : tags) queue_.start_load(engine_, piece(tag), tag).wait();
  EXPECT_EQ(tags_of(take_until_done(queue_, tags.size())), tags);
}

TEST_F(EventQueueTest, TheDescriptorIsReadableUntilTheLastEventIsTaken) {
  EXPECT_FALSE(is_readable(queue_.fd()));
  EXPECT_EQ(queue_.take(some_), 0u);
  for (int round = 0; round < 2; ++round) {
    for (std::uint64_t tag = 0; tag < 5; ++tag) queue_.start_load(engine_, piece(tag), tag).wait();
    EXPECT_EQ(queue_.take({}), 0u);
    for (const std::size_t left : {2u, 2u, 1u}) {
      EXPECT_TRUE(is_readable(queue_.fd()));
      EXPECT_EQ(queue_.take(std::span(some_).first(2)), left);
    }
    EXPECT_FALSE(is_readable(queue_.fd()));
    EXPECT_EQ(queue_.take(some_), 0u);
  }
}

TEST_F(EventQueueTest, ABurstCostsOneWrite) {
  EXPECT_EQ(writes_to(queue_), "0");
  for (std::uint64_t tag = 0; tag < 100; ++tag) queue_.start_load(engine_, piece(tag), tag).wait();
  EXPECT_EQ(writes_to(queue_), "1");
  std::array<Event, 60> most;
  EXPECT_EQ(queue_.take(most), 60u);
  queue_.start_load(engine_, piece(0), 100).wait();
  EXPECT_EQ(writes_to(queue_), "1");
  EXPECT_EQ(queue_.take(most), 41u);
  EXPECT_EQ(writes_to(queue_), "0");
}

TEST_F(EventQueueTest, ARequestThatIsRefusedGivesNoEvent) {
  EXPECT_THROW(queue_.start_load(engine_, wrong(), 1), Error);
  FileWriter writer = engine_.create(dir_ / "copy");
  EXPECT_THROW(queue_.start_write(writer, {.extents = {{0, 5, nullptr}}}, 1), Error);
  queue_.start_load(engine_, piece(0), 2).wait();
  EXPECT_EQ(tags_of(take_until_done(queue_, 1)), std::vector<std::uint64_t>{2});
  EXPECT_EQ(queue_.take(some_), 0u);
}

TEST_F(EventQueueTest, ProgramsWithoutExceptionsGetCodes) {
  std::error_code error = Errc::kBadFile;
  std::optional<EventQueue> queue = EventQueue::make(error);
  ASSERT_TRUE(queue && !error);
  EXPECT_FALSE(queue->start_load(engine_, wrong(), 1, error).valid());
  EXPECT_EQ(error, Errc::kInvalidArgument);
  FileWriter writer = engine_.create(dir_ / "copy");
  EXPECT_FALSE(queue->start_write(writer, {.extents = {{0, 5, nullptr}}}, 2, error).valid());
  EXPECT_EQ(error, Errc::kInvalidArgument);
  const Transfer load = queue->start_load(engine_, whole(), 3, error);
  EXPECT_TRUE(load.valid() && !error);
  const Transfer write = queue->start_write(writer, {.extents = {{0, 5, bytes_.data()}}}, 4, error);
  EXPECT_TRUE(write.valid() && !error);
  EXPECT_EQ(take_until_done(*queue, 2).size(), 2u);
}

TEST_F(EventQueueTest, AQueueCanBeMovedAndThenItsEventsComeToItsNewPlace) {
  Plug plug(engine_);
  queue_.start_load(engine_, piece(0), 1).detach();
  EventQueue moved(std::move(queue_));
  queue_ = EventQueue();
  plug.pull();
  EXPECT_EQ(tags_of(take_until_done(moved, 1)), std::vector<std::uint64_t>{1});
  EXPECT_EQ(queue_.take(some_), 0u);
  const int fd = queue_.fd();
  moved = std::move(queue_);
  EXPECT_EQ(moved.fd(), fd);
}

TEST_F(EventQueueTest, SeveralEnginesAndThreadsUseOneQueue) {
  constexpr std::size_t kLoads = 200;
  std::array<Engine, 2> engines{Engine(testing::small_engine()), Engine(testing::small_engine())};
  std::atomic<std::size_t> taken = 0;
  {
    std::vector<std::jthread> threads;
    for (std::size_t n = 0; n < engines.size(); ++n) {
      threads.emplace_back([&, n] {
        // No two loads write to the same memory.
        for (std::size_t i = 0; i < kLoads; ++i) queue_.start_load(engines[n], piece(n * kLoads + i), i).detach();
      });
      threads.emplace_back([&] {
        std::array<Event, 3> events;
        while (taken < 2 * kLoads) taken += queue_.take(events);
      });
    }
  }
  EXPECT_EQ(taken, 2 * kLoads);
  EXPECT_FALSE(is_readable(queue_.fd()));
}

TEST_F(EventQueueTest, AForkedChildTakesNothingFromItsParent) {
  Plug plug(engine_);
  queue_.start_load(engine_, whole(), 1).detach();
  Engine other(testing::small_engine());
  queue_.start_load(other, piece(0), 2).wait();
  const int status = testing::run_in_child([&] {
    EventQueue mine(std::move(queue_));
    if (mine.take(some_) != 0 || !is_readable(mine.fd())) return 1;
    std::error_code error;
    if (mine.start_load(other, piece(0), 3, error).valid() || error != Errc::kUnusable) return 2;
#if !FLASHPACK_TSAN  // It allows the child of threads no threads.
    Engine own(testing::small_engine());
    if (mine.start_load(own, piece(0), 3, error).valid() || error != Errc::kUnusable) return 4;
#endif
    mine = EventQueue();
    return mine.take(some_) == 0 && !is_readable(mine.fd()) ? 0 : 3;
  });
  EXPECT_EQ(status, 0);
  plug.pull();
  EXPECT_EQ(tags_of(take_until_done(queue_, 2)), (std::vector<std::uint64_t>{2, 1}));
  EXPECT_TRUE(right());
}

}  // namespace
}  // namespace flashpack
