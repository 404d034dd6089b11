#include "engine/ring.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "engine/ground/option_limits.h"
#include "engine/pipeline.h"
#include "engine/staging.h"
#include "engine/workers.h"
#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::GuardedMemory;
using flashpack::testing::kMiB;

class RingTest : public ::testing::Test {
 protected:
  void SetUp() override {
    try {
      ring_ = std::make_unique<Ring>(8, staging_.slots());
    } catch (const std::system_error& error) {
      GTEST_SKIP() << error.what();
    }
    flashpack::testing::write_file(dir_ / "file", bytes_);
    flashpack::testing::drop_from_cache(dir_ / "file");
    fd_.reset(::open((dir_ / "file").c_str(), O_RDONLY | O_DIRECT));
  }

  std::int64_t read(unsigned tag, std::span<std::byte> memory, std::uint64_t offset, int slot = -1) {
    ring_->push(
        tag, {.op = DiskRequest::Op::kRead, .fd = fd_.get(), .offset_bytes = offset, .memory = memory, .slot = slot});
    while (true) {
      for (const IoCompletion& done : ring_->wait(std::nullopt)) {
        EXPECT_EQ(done.tag, tag);
        return done.result;
      }
    }
  }

  flashpack::testing::TempDir dir_;
  std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(2 * kMiB + 777);
  Staging staging_{4 * kMiB, kMiB};
  std::unique_ptr<Ring> ring_;
  UniqueFd fd_;
};

TEST_F(RingTest, HasEntriesForAsManyOperationsAsTheLargestEngineHas) {
  const unsigned tags = Pipeline::tag_limit({.queue_depth = kMaxQueueDepth,
                                             .worker_depth = 4 * kMaxWorkers,
                                             .chunk_bytes = kMinChunkBytes,
                                             .slots = kMaxSlots});
  EXPECT_EQ(tags, DiskQueue::kMostTags);
  EXPECT_NO_THROW(Ring(tags, {}));
}

// A thread has 16 places for rings without a descriptor.
TEST_F(RingTest, ARingHasNoDescriptorAndGivesItsPlaceBack) {
  constexpr unsigned kRegisteredRing = 1u << 13;  // IORING_FEAT_REG_REG_RING.
  io_uring bare{};
  ASSERT_EQ(::io_uring_queue_init(1, &bare, 0), 0);
  const bool known = bare.features & kRegisteredRing;
  ::io_uring_queue_exit(&bare);
  if (!known) GTEST_SKIP() << "Linux before 6.3";
  for (int i = 0; i < 40; ++i) {
    ring_ = std::make_unique<Ring>(8, staging_.slots());
    for (const auto& fd : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code gone;
      ASSERT_EQ(std::filesystem::read_symlink(fd, gone).string().find("io_uring"), std::string::npos) << i;
    }
  }
}

TEST_F(RingTest, TheKernelGetsSeveralOperationsTogetherBeforeTheOwnerWaits) {
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  const UniqueFd out(ends[0]);
  const UniqueFd in(ends[1]);
  std::vector<std::byte> bytes(1);
  const auto push = [&](unsigned tag) {
    ring_->push(tag, {.op = DiskRequest::Op::kWrite, .fd = in.get(), .offset_bytes = 0, .memory = bytes});
  };
  pollfd ready{out.get(), POLLIN, 0};
  for (unsigned tag = 0; tag < 4; ++tag) push(tag);
  EXPECT_EQ(::poll(&ready, 1, 0), 0) << "so few cost a system call of their own";
  for (unsigned tag = 4; tag < 8; ++tag) push(tag);
  EXPECT_EQ(::poll(&ready, 1, 10'000), 1) << "no write has begun";
  std::size_t ended = 0;
  while (ended < 8) ended += ring_->wait(std::nullopt).size();
}

TEST_F(RingTest, ReadsIntoSlotsBeforeAndAfterTheyAreRegistered) {
  const auto slot = staging_.slots()[2];
  for (int use = 0; use < 5; ++use) {
    std::memset(slot.data(), 0, slot.size());
    ASSERT_EQ(read(3, slot, kMiB, 2), kMiB);
    EXPECT_TRUE(testing::same_bytes(slot.data(), bytes_.data() + kMiB, kMiB));
  }
  EXPECT_EQ(ring_->fallback_reason(), "");
}

TEST_F(RingTest, SmallReadsDoNotTakeTheRestOfTheirSlotFromTheSystem) {
  const Staging large(8 * kMiB, 4 * kMiB);
  ring_ = std::make_unique<Ring>(8, large.slots());
  const auto slot = large.slots()[1];
  for (int use = 0; use < 5; ++use) ASSERT_EQ(read(3, slot.first(4096), kMiB, 1), 4096);
  EXPECT_TRUE(testing::same_bytes(slot.data(), bytes_.data() + kMiB, 4096));
  // The first page may be a huge one.
  EXPECT_FALSE(is_populated(slot.last(kMiB)));
  for (int use = 0; use < 5; ++use) ASSERT_EQ(read(3, slot.first(2 * kMiB), 0, 1), 2 * kMiB);
  EXPECT_TRUE(is_populated(slot.last(kMiB))) << "registered, because most of it is used again and again";
  ASSERT_EQ(read(3, slot.first(4096), kMiB, 1), 4096);
  EXPECT_TRUE(testing::same_bytes(slot.data(), bytes_.data() + kMiB, 4096));
  EXPECT_EQ(ring_->fallback_reason(), "");
}

TEST_F(RingTest, TheTailOfAFileComesBackShort) {
  GuardedMemory memory(8192);
  EXPECT_EQ(read(0, {memory.data(), 8192}, 2 * kMiB), 777);
  EXPECT_TRUE(testing::same_bytes(memory.data(), bytes_.data() + 2 * kMiB, 777));
  EXPECT_TRUE(memory.intact());
}

TEST_F(RingTest, MisalignedReadsKeepTheirErrno) {
  GuardedMemory memory(8192);
  EXPECT_EQ(read(0, {memory.data(), 100}, 1), -EINVAL);
}

TEST_F(RingTest, EveryRungReadsTheSameBytesAndSaysWhichItIs) {
  for (const Ring::Rung rung : {Ring::Rung::kDeferred, Ring::Rung::kCooperative, Ring::Rung::kBare}) {
    ring_ = std::make_unique<Ring>(8, staging_.slots(), rung);
    if (ring_->rung() == rung) {
      EXPECT_EQ(ring_->fallback_reason(), "");
    } else {
      EXPECT_NE(ring_->fallback_reason().find("TASKRUN"), std::string::npos);
    }
    for (int use = 0; use < 4; ++use) {
      std::memset(staging_.slots()[0].data(), 0, kMiB);
      ASSERT_EQ(read(3, staging_.slots()[0], kMiB, 0), kMiB);
      EXPECT_TRUE(testing::same_bytes(staging_.slots()[0].data(), bytes_.data() + kMiB, kMiB));
    }
  }
}

/// A read, pushed to `ring`, of a pipe that nobody writes to.
class PipeRead {
 public:
  PipeRead(Ring& ring, unsigned tag) {
    std::array<int, 2> ends{};
    EXPECT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
    never_written_.reset(ends[0]);
    writer_.reset(ends[1]);
    ring.push(tag,
              {.op = DiskRequest::Op::kRead, .fd = never_written_.get(), .memory = {memory_.data(), memory_.size()}});
  }

 private:
  UniqueFd never_written_;
  UniqueFd writer_;
  GuardedMemory memory_{4096};
};

TEST_F(RingTest, ACancelledReadEndsThoughNothingEverComes) {
  const PipeRead read_of_nothing(*ring_, 5);
  ASSERT_TRUE(ring_->wait(std::chrono::nanoseconds(0)).empty());
  ring_->cancel(5);
  std::span<const IoCompletion> done;
  while ((done = ring_->wait(std::nullopt)).empty()) {
  }
  EXPECT_EQ(done.front().tag, 5u);
  EXPECT_LT(done.front().result, 0);
  ring_->cancel(5);
  EXPECT_TRUE(ring_->wait(std::chrono::nanoseconds(0)).empty()) << "a cancel is no completion";
  EXPECT_EQ(read(5, staging_.slots()[0], kMiB, 0), kMiB) << "and does not outlive the operation";
}

TEST_F(RingTest, WakeReachesASleepingRingAgainAndAgain) {
  for (int i = 0; i < 20; ++i) {
    std::thread waker([this] { ring_->wake(); });
    EXPECT_TRUE(ring_->wait(std::nullopt).empty());
    waker.join();
  }
  EXPECT_TRUE(ring_->wait(std::chrono::microseconds(10)).empty());
  EXPECT_TRUE(ring_->wait(std::chrono::nanoseconds(0)).empty());
}

// The descriptor of the only eventfd in this process; -1 if there is none or more than one.
int only_eventfd() {
  int found = -1;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    if (std::filesystem::read_symlink(entry, gone).string() != "anon_inode:[eventfd]") continue;
    if (found >= 0) return -1;
    found = std::stoi(entry.path().filename().string());
  }
  return found;
}

TEST_F(RingTest, WhenWakeReadsKeepFailingTheRingIsGivenUpAndItsOperationsComeBack) {
  const int wake_fd = only_eventfd();
  if (wake_fd < 0) GTEST_SKIP() << "the ring's eventfd cannot be told from others";
  const PipeRead read_of_nothing(*ring_, 5);
  ASSERT_TRUE(ring_->wait(std::chrono::nanoseconds(0)).empty());

  // The read that is armed ends well. Those that follow find a descriptor that cannot be read.
  const UniqueFd event(::dup(wake_fd));
  const UniqueFd write_only(::open("/dev/null", O_WRONLY | O_CLOEXEC));
  ASSERT_EQ(::dup2(write_only.get(), wake_fd), wake_fd);
  const std::uint64_t one = 1;
  ASSERT_EQ(::write(event.get(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
  for (int i = 0; i < 100 && !ring_->refuses(); ++i) ASSERT_TRUE(ring_->wait(std::nullopt).empty());
  ASSERT_TRUE(ring_->refuses());
  EXPECT_NE(ring_->fallback_reason().find("eventfd: Bad file descriptor"), std::string::npos)
      << ring_->fallback_reason();
  std::span<const IoCompletion> done;
  while ((done = ring_->wait(std::nullopt)).empty()) {
  }
  ASSERT_EQ(done.size(), 1u);
  EXPECT_EQ(done.front().tag, 5u);
  EXPECT_EQ(done.front().result, -EAGAIN);

  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 20; ++i) EXPECT_TRUE(ring_->wait(std::nullopt).empty());
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(50)) << "it turns without a pause";
}

// What an engine under a container's seccomp profile does: 0 when it delivered right bytes by the workers and said why.
int load_with_syscall_denied(long number, int error_number) {
  const flashpack::testing::TempDir dir;
  const auto bytes = flashpack::testing::random_bytes(3 * kMiB);
  flashpack::testing::write_file(dir / "file", bytes);
  flashpack::testing::drop_from_cache(dir / "file");
  if (!flashpack::testing::deny_syscall(static_cast<unsigned>(number), static_cast<unsigned>(error_number)))
    return flashpack::testing::kSkip;
  Engine engine({.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB});
  GuardedMemory memory(bytes.size());
  const TransferStats stats =
      engine.load({.files = {{.path = dir / "file", .extents = {{0, memory.size(), memory.data()}}}}});
  if (!testing::same_bytes(memory.data(), bytes.data(), bytes.size()) || !memory.intact()) return 1;
  if (stats.backend != Backend::kWorkers) return 2;
  if (stats.fallback_reason.find("io_uring") == std::string::npos) return 3;
  try {
    const Engine insists({.backend = Backend::kIoUring});
    return 4;
  } catch (const Error& error) {
    return error.code().value() == error_number ? 0 : 5;
  }
}

TEST(RingRefused, WhereSetupIsDeniedTheWorkersReadAndSayWhy) {
  for (const int error_number : {EPERM, ENOSYS}) {
    const int status =
        flashpack::testing::run_in_child([&] { return load_with_syscall_denied(SYS_io_uring_setup, error_number); });
    if (status == flashpack::testing::kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
    EXPECT_EQ(status, 0) << error_number;
  }
}

TEST(RingRefused, WhereOnlySubmittingIsDeniedTheWorkersReadToo) {
  const int status =
      flashpack::testing::run_in_child([] { return load_with_syscall_denied(SYS_io_uring_enter, EPERM); });
  if (status == flashpack::testing::kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
  EXPECT_EQ(status, 0);
}

TEST(RingRefused, WhereBuffersCannotBeRegisteredReadsGoOnAndSayWhy) {
  const int status = flashpack::testing::run_in_child([] {
    if (!flashpack::testing::deny_syscall(SYS_io_uring_register, ENOMEM)) return flashpack::testing::kSkip;
    const flashpack::testing::TempDir dir;
    const auto bytes = flashpack::testing::random_bytes(kMiB);
    flashpack::testing::write_file(dir / "file", bytes);
    Staging staging(2 * kMiB, kMiB);
    std::unique_ptr<Ring> ring;
    try {
      ring = std::make_unique<Ring>(4, staging.slots());
    } catch (const std::system_error&) {
      return flashpack::testing::kSkip;
    }
    const UniqueFd fd(::open((dir / "file").c_str(), O_RDONLY | O_DIRECT));
    for (int use = 0; use < 4; ++use) {
      ring->push(0, {.op = DiskRequest::Op::kRead, .fd = fd.get(), .memory = staging.slots()[0], .slot = 0});
      std::span<const IoCompletion> done;
      while ((done = ring->wait(std::nullopt)).empty()) {
      }
      if (done.front().result != kMiB || !testing::same_bytes(staging.slots()[0].data(), bytes.data(), kMiB)) return 1;
    }
    return ring->fallback_reason().find("registered buffers") == 0 ? 0 : 2;
  });
  if (status == flashpack::testing::kSkip) GTEST_SKIP() << "seccomp filters or io_uring are not allowed here";
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace flashpack::internal
