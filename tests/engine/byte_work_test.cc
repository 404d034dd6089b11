#include "engine/byte_work.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "engine/ground/host_region.h"
#include "engine/ground/mappings.h"
#include "engine/ground/target_pages.h"
#include "engine/ground/unique_fd.h"
#include "engine/stripe_sums.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/sandbox.h"
#include "tests/support/small_file_test.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::GuardedMemory;

class ByteWorkTest : public flashpack::testing::SmallFileTest {
 protected:
  // Whether `cached` is refused after `drop`. That starts to read what is missing, which may have come in time: then
  // all of it is there, and the next attempt counts. Work that ignores PageCache is never refused.
  bool is_refused_when(const std::function<void()>& drop, const ByteWork& cached, std::int64_t whole) {
    constexpr int kAttempts = 200;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      drop();
      const std::int64_t result = carry_out(cached);
      if (result == -EAGAIN) return true;
      EXPECT_EQ(result, whole);
    }
    return false;
  }

  bool right(const GuardedMemory& memory, std::uint64_t offset) const {
    return memory.intact() && testing::same_bytes(memory.data(), bytes_.data() + offset, memory.size());
  }
};

TEST_F(ByteWorkTest, FragmentsWithGapsOverlapsAndFarJumpsAreAllRead) {
  std::vector<std::unique_ptr<GuardedMemory>> memory;
  std::vector<Fragment> fragments;
  std::uint64_t offset = 0;
  for (std::uint64_t step : {10u, 0u, 4096u, 4097u, 50'000u, 1u, 100u}) {
    offset += step;
    memory.push_back(std::make_unique<GuardedMemory>(3000, step));
    fragments.push_back({offset, 3000, memory.back()->data()});
    if (step != 0) offset += step == 1 ? 1000 : 3000;  // The fragment after step 0 starts where this one does: overlap.
  }
  EXPECT_EQ(carry_out({.op = ByteWork::Op::kFromCache, .fd = fd_.get(), .fragments = fragments}), 7 * 3000);
  for (std::size_t i = 0; i < fragments.size(); ++i) EXPECT_TRUE(right(*memory[i], fragments[i].offset_bytes)) << i;
}

TEST_F(ByteWorkTest, MoreSmallFragmentsThanOneSystemCallTakes) {
  GuardedMemory memory(200'000);
  std::vector<Fragment> fragments;
  for (std::uint64_t at = 0; at + 100 <= memory.size(); at += 100) fragments.push_back({at, 100, memory.data() + at});
  EXPECT_EQ(carry_out({.op = ByteWork::Op::kFromCache, .fd = fd_.get(), .fragments = fragments}), 200'000);
  EXPECT_TRUE(right(memory, 0));
}

TEST_F(ByteWorkTest, TheEndOfTheFileShowsAsMissingBytes) {
  GuardedMemory a(1000);
  GuardedMemory b(1000);
  const std::vector<Fragment> fragments = {{298'000, 1000, a.data()}, {299'500, 1000, b.data()}};
  EXPECT_EQ(carry_out({.op = ByteWork::Op::kFromCache, .fd = fd_.get(), .fragments = fragments}), 1500);
  EXPECT_TRUE(a.intact() && b.intact());
}

TEST_F(ByteWorkTest, ErrorsKeepTheirErrno) {
  GuardedMemory memory(1000);
  const std::vector<Fragment> fragments = {{0, 1000, memory.data()}};
  EXPECT_EQ(carry_out({.op = ByteWork::Op::kFromCache, .fd = -1, .fragments = fragments}), -EBADF);
  const UniqueFd read_only(::open((dir_ / "file").c_str(), O_RDONLY));
  EXPECT_EQ(carry_out({.op = ByteWork::Op::kToCache, .fd = read_only.get(), .fragments = fragments}), -EBADF);
}

TEST_F(ByteWorkTest, OfReadsOnlyFragmentsOfTheFileWithoutAGapAreCounted) {
  constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
  std::vector<std::byte> memory(4 * kStripeBytes);
  flashpack::testing::write_file(dir_ / "large", memory);
  const UniqueFd large(::open((dir_ / "large").c_str(), O_RDONLY));
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges = {{0, 100},
                                                                       {100, kStripeBytes + 7},
                                                                       {kStripeBytes + 9, 2 * kStripeBytes},
                                                                       {2 * kStripeBytes, 3 * kStripeBytes + 5},
                                                                       {4 * kStripeBytes - 5, 4 * kStripeBytes}};
  std::vector<Fragment> fragments;
  for (const auto& [begin, end] : ranges) fragments.push_back({begin, end - begin, memory.data() + begin});
  StripeSums sums(0, 4 * kStripeBytes);
  carry_out({.op = ByteWork::Op::kFromCache, .fd = large.get(), .fragments = fragments, .sums = &sums});
  std::vector<std::uint32_t> counted;
  for (std::uint64_t index = 0; index < 4; ++index) counted.push_back(sums.counted_bytes(index));
  EXPECT_EQ(counted, (std::vector<std::uint32_t>{kStripeBytes, 0, kStripeBytes, 0}));
}

TEST_F(ByteWorkTest, ALargeFragmentIsCountedWhenAllOfItHasComeAndElseNotAtAll) {
  constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
  const auto bytes = flashpack::testing::random_bytes(kStripeBytes + 300'001);
  flashpack::testing::write_file(dir_ / "large", bytes);
  const UniqueFd large(::open((dir_ / "large").c_str(), O_RDONLY));
  std::vector<std::byte> memory(2 * kStripeBytes);
  StripeSums sums(0, memory.size());
  const auto read = [&](std::uint64_t offset, std::uint64_t size) {
    const Fragment fragment{offset, size, memory.data() + offset};
    return carry_out({.op = ByteWork::Op::kFromCache, .fd = large.get(), .fragments = {&fragment, 1}, .sums = &sums});
  };
  EXPECT_EQ(read(1, memory.size() - 1), static_cast<std::int64_t>(bytes.size() - 1));
  EXPECT_EQ(sums.counted_bytes(0), 0u);
  EXPECT_EQ(sums.counted_bytes(1), 0u);
  EXPECT_EQ(read(0, bytes.size()), static_cast<std::int64_t>(bytes.size()));
  EXPECT_EQ(sums.crc32c(0, kStripeBytes), crc32c(std::span(bytes).first(kStripeBytes)));
  EXPECT_EQ(sums.crc32c(1, 300'001), crc32c(std::span(bytes).subspan(kStripeBytes)));
  EXPECT_EQ(sums.counted_bytes(1), 300'001u);
}

TEST_F(ByteWorkTest, ALargeFragmentThatIsCachedInPartIsRefusedAndNothingStaysCounted) {
  constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
  const auto bytes = flashpack::testing::random_bytes(3 * kStripeBytes);
  flashpack::testing::write_file(dir_ / "large", bytes);
  const UniqueFd large(::open((dir_ / "large").c_str(), O_RDONLY));
  std::vector<std::byte> memory(bytes.size());
  StripeSums sums(0, memory.size());
  const Fragment fragment{0, memory.size(), memory.data()};
  const ByteWork cached{.op = ByteWork::Op::kFromCache,
                        .fd = large.get(),
                        .fragments = {&fragment, 1},
                        .page_cache = {.only = true},
                        .sums = &sums};
  const auto drop_the_end = [&] {
    flashpack::testing::read_file(dir_ / "large");
    sums = StripeSums(0, memory.size());
    ::fdatasync(large.get());
    ::posix_fadvise(large.get(), 2 * kStripeBytes, kStripeBytes, POSIX_FADV_DONTNEED);
  };
  ASSERT_TRUE(is_refused_when(drop_the_end, cached, static_cast<std::int64_t>(memory.size())));
  for (std::uint64_t index = 0; index < 3; ++index) EXPECT_EQ(sums.counted_bytes(index), 0u) << index;
}

TEST_F(ByteWorkTest, WritesArriveAndScatterTakesOnlyItsFragments) {
  GuardedMemory memory(5000);
  std::vector<Fragment> fragments = {{1000, 5000, memory.data()}};
  std::memset(memory.data(), 7, memory.size());
  EXPECT_EQ(carry_out({.op = ByteWork::Op::kToCache, .fd = fd_.get(), .fragments = fragments}), 5000);
  EXPECT_EQ(flashpack::testing::read_file(dir_ / "file")[1000], std::byte{7});

  std::vector<std::byte> slot(bytes_.begin() + 4096, bytes_.begin() + 12'288);
  GuardedMemory a(10);
  GuardedMemory b(2000);
  fragments = {{5000, 10, a.data()}, {10'000, 2000, b.data()}};
  carry_out({.op = ByteWork::Op::kScatter, .view = {4096, slot}, .fragments = fragments});
  EXPECT_TRUE(right(a, 5000));
  EXPECT_TRUE(right(b, 10'000));
}

TEST_F(ByteWorkTest, OnlyCachedReadsGiveAllOrSayThatTheyWouldWait) {
  std::vector<std::unique_ptr<GuardedMemory>> memory;
  std::vector<Fragment> fragments;
  for (const std::uint64_t offset : {0u, 3000u, 100'000u, 200'000u}) {
    memory.push_back(std::make_unique<GuardedMemory>(3000));
    fragments.push_back({offset, 3000, memory.back()->data()});
  }
  const ByteWork cached{
      .op = ByteWork::Op::kFromCache, .fd = fd_.get(), .fragments = fragments, .page_cache = {.only = true}};
  flashpack::testing::read_file(dir_ / "file");
  EXPECT_EQ(carry_out(cached), 4 * 3000);
  for (std::size_t i = 0; i < fragments.size(); ++i) EXPECT_TRUE(right(*memory[i], fragments[i].offset_bytes)) << i;
  EXPECT_TRUE(is_refused_when([&] { flashpack::testing::drop_from_cache(dir_ / "file"); }, cached, 4 * 3000));
  for (std::size_t i = 0; i < fragments.size(); ++i) EXPECT_TRUE(right(*memory[i], fragments[i].offset_bytes)) << i;
  ByteWork past_the_end = cached;
  fragments.back().offset_bytes = 299'000;
  flashpack::testing::read_file(dir_ / "file");
  EXPECT_EQ(carry_out(past_the_end), -EAGAIN);
}

TEST_F(ByteWorkTest, DroppedPagesAreReadFromTheDiskTheNextTime) {
  GuardedMemory memory(bytes_.size());
  const std::vector<Fragment> fragments = {{0, memory.size(), memory.data()}};
  ByteWork request{.op = ByteWork::Op::kFromCache, .fd = fd_.get(), .fragments = fragments};
  flashpack::testing::drop_from_cache(dir_ / "file");  // Written back: dirty pages stay.
  EXPECT_EQ(carry_out(request), 300'000);
  request.page_cache = {.only = true};
  ASSERT_EQ(carry_out(request), 300'000);
  ByteWork dropping = request;
  dropping.page_cache = {.drop = true};
  EXPECT_TRUE(is_refused_when([&] { EXPECT_EQ(carry_out(dropping), 300'000); }, request, 300'000));
  EXPECT_TRUE(right(memory, 0));
}

struct TouchedMemory final : PagePolicy {
  void was_touched(std::span<const std::byte> memory, std::chrono::nanoseconds) noexcept override {
    touched.push_back(memory);
  }
  bool has_small_pages(const std::byte*) noexcept override { return false; }
  std::vector<std::span<const std::byte>> touched;
};

TEST(PopulatedTest, ACopyToMemoryThatHasItsPagesTellsNothingOfFreshOnes) {
  TouchedMemory policy;
  const HostRegion target(8 * kPageBytes, "a test");
  std::vector<std::byte> slot(8 * kPageBytes);
  const Fragment fragment{.offset_bytes = 0, .size_bytes = slot.size(), .memory = target.bytes().data()};
  const ByteWork work{.op = ByteWork::Op::kScatter,
                      .view = {0, {slot.data(), slot.size()}},
                      .fragments = {&fragment, 1},
                      .page_policy = &policy};
  ASSERT_EQ(carry_out(work), 0);
  EXPECT_EQ(policy.touched.size(), 1u);
  ASSERT_EQ(carry_out(work), 0);
  EXPECT_EQ(policy.touched.size(), 1u);
}

TEST(PopulatedTest, WhoeverWantsToKnowIsToldOfMemoryThatIsPopulatedToBeWritten) {
  TouchedMemory listener;
  GuardedMemory memory(8 * kPageBytes);
  ByteWork work{.op = ByteWork::Op::kPopulate,
                .view = {0, {memory.data(), memory.size()}},
                .touch = ByteWork::Touch::kForReading,
                .page_policy = &listener};
  ASSERT_EQ(carry_out(work), 0);
  EXPECT_TRUE(listener.touched.empty()) << "pages that are only read tell nothing about fresh ones";
  work.touch = ByteWork::Touch::kForWriting;
  ASSERT_EQ(carry_out(work), 0);
  ASSERT_EQ(listener.touched.size(), 1u);
  EXPECT_EQ(listener.touched[0].data(), memory.data());
  EXPECT_EQ(listener.touched[0].size(), memory.size());
  work.page_policy = nullptr;
  ASSERT_EQ(carry_out(work), 0);
  EXPECT_EQ(listener.touched.size(), 1u);
}

TEST(PopulatedTest, ACopyFailsAsItsPageFaultsDoAndABadAddressIsEfault) {
  // Memory that is not mapped, which is ENOMEM as well, is in FlawedMemoryTest.
  for (const int refusal : {ENOMEM, EHWPOISON, EFAULT, EINVAL}) {
    const int error = flashpack::testing::run_in_child([refusal] {
      std::array<std::byte, 8> slot{};
      std::array<std::byte, 8> memory{};
      const Fragment fragment{0, memory.size(), memory.data()};
      if (!flashpack::testing::deny_syscall(SYS_madvise, static_cast<unsigned>(refusal)))
        return flashpack::testing::kSkip;
      return static_cast<int>(
          -carry_out({.op = ByteWork::Op::kScatter, .view = {0, slot}, .fragments = {&fragment, 1}}));
    });
    if (error == flashpack::testing::kSkip) GTEST_SKIP() << "no seccomp here";
    EXPECT_EQ(error, refusal == EINVAL ? EFAULT : refusal);
  }
}

// Gathers `memory`, as a store does. Returns 0, or an errno.
int gather_error(std::span<std::byte> memory) {
  std::vector<std::byte> slot(memory.size());
  const Fragment fragment{.offset_bytes = 0, .size_bytes = memory.size(), .memory = memory.data()};
  const std::int64_t result = carry_out({.op = ByteWork::Op::kGather, .view = {0, slot}, .fragments = {&fragment, 1}});
  EXPECT_TRUE(result != 0 || testing::same_bytes(slot.data(), memory.data(), memory.size()));
  return static_cast<int>(-result);
}

// The same in a child to which the kernel refuses to populate (EHWPOISON) and each call of `denied` (EPERM).
int gather_error_without_populate(std::span<std::byte> memory, const std::vector<long>& denied = {}) {
  return flashpack::testing::run_in_child([&] {
    bool allowed = flashpack::testing::deny_syscall(SYS_madvise, EHWPOISON);
    for (const long number : denied)
      allowed = allowed && flashpack::testing::deny_syscall(static_cast<unsigned>(number), EPERM);
    return allowed ? gather_error(memory) : flashpack::testing::kSkip;
  });
}

// Memory that is to be copied, whose pages are all there.
class GatheredMemoryTest : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = 1 << 20;

  GatheredMemoryTest() {
    ::madvise(region_.data(), kBytes, MADV_NOHUGEPAGE);  // So that a single page can be absent.
    testing::fill_bytes(region_.data(), std::byte{1}, kBytes);
  }

  void SetUp() override {
    const int error = gather_error_without_populate(memory_);
    if (error == flashpack::testing::kSkip) GTEST_SKIP() << "no seccomp here";
    if (!Mappings().are_anonymous_and_readable(memory_)) GTEST_SKIP() << "the kernel does not tell of mappings";
    EXPECT_EQ(error, 0) << "pages that are there were populated";
  }

  // The page in the middle.
  std::byte* middle() const { return memory_.data() + kBytes / 2; }

  const HostRegion region_{kBytes, "a test"};
  const std::span<std::byte> memory_ = region_.bytes().first(kBytes);
};

TEST_F(GatheredMemoryTest, AnonymousMemoryIsNotPopulatedUnlessAPageIsAbsent) {
  ASSERT_EQ(::madvise(middle(), kPageBytes, MADV_DONTNEED), 0);
  EXPECT_EQ(gather_error_without_populate(memory_), EHWPOISON);
  EXPECT_EQ(gather_error(memory_), 0);
  EXPECT_EQ(gather_error_without_populate(memory_), 0) << "the first copy left a page absent";
}

TEST_F(GatheredMemoryTest, WhereTheKernelDoesNotTellOfMappingsAllIsPopulated) {
  EXPECT_EQ(gather_error_without_populate(memory_, {SYS_openat}), EHWPOISON);
  EXPECT_EQ(gather_error_without_populate(memory_, {SYS_ioctl}), EHWPOISON);
  EXPECT_EQ(gather_error_without_populate(memory_, {SYS_mincore}), EHWPOISON);
}

TEST_F(GatheredMemoryTest, AFileInTheMiddleIsPopulatedThoughItsPagesAreThere) {
  const testing::TempDir dir;
  const UniqueFd file(::open((dir / "file").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ftruncate(file.get(), kPageBytes), 0);
  for (const int flags : {MAP_SHARED, MAP_PRIVATE}) {
    ASSERT_NE(::mmap(middle(), kPageBytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, file.get(), 0), MAP_FAILED);
    *middle() = std::byte{2};
    EXPECT_EQ(gather_error_without_populate(memory_), EHWPOISON);
    EXPECT_EQ(gather_error(memory_), 0);
  }
}

TEST_F(GatheredMemoryTest, AForkedChildIsAskedForItsOwnMemory) {
  EXPECT_EQ(gather_error(memory_), 0);  // In the parent first.
  EXPECT_EQ(flashpack::testing::run_in_child([&] {
              ::mprotect(middle(), kPageBytes, PROT_NONE);
              return gather_error(memory_);
            }),
            EFAULT);
}

TEST(PopulatedTest, FreshMemoryIsNotAndTouchedMemoryIs) {
  constexpr std::size_t kBytes = 9 << 20;  // More than is asked about at a time.
  void* at = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(at, MAP_FAILED);
  const std::span memory(static_cast<std::byte*>(at), kBytes);
  ::madvise(at, kBytes, MADV_NOHUGEPAGE);
  EXPECT_FALSE(is_populated(memory));
  std::memset(at, 1, kBytes - kPageBytes);
  EXPECT_FALSE(is_populated(memory)) << "one page is missing";
  memory.back() = std::byte{1};
  EXPECT_TRUE(is_populated(memory));
  ::munmap(at, kBytes);
}

}  // namespace
}  // namespace flashpack::internal
