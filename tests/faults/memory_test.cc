// Loads into memory that cannot be written to, and stores from memory that cannot be read.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "flashpack/unique_fd.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::kMiB;

enum class Flaw { kNoAccess, kReadOnly, kUnmapped, kHole, kGuard, kPastTheEndOfItsFile, kTurnsIntoAFile };

std::string name_of(Flaw flaw) {
  switch (flaw) {
    case Flaw::kNoAccess:
      return "NoAccess";
    case Flaw::kReadOnly:
      return "ReadOnly";
    case Flaw::kUnmapped:
      return "Unmapped";
    case Flaw::kHole:
      return "Hole";
    case Flaw::kGuard:
      return "Guard";
    case Flaw::kPastTheEndOfItsFile:
      return "PastTheEndOfItsFile";
    case Flaw::kTurnsIntoAFile:
      return "TurnsIntoAFile";
  }
  return "";
}

/// Memory with a flaw from its middle on. A hole and a guard are in its middle alone, what is not mapped is so from the
/// start, and a file that it turns into has no bytes.
class FlawedMemory {
 public:
  FlawedMemory(Flaw flaw, const std::filesystem::path& file) {
    if (flaw == Flaw::kUnmapped) return;
    const bool has_file = flaw == Flaw::kPastTheEndOfItsFile || flaw == Flaw::kTurnsIntoAFile;
    const UniqueFd fd(has_file ? ::open(file.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600) : -1);
    const bool is_file = flaw == Flaw::kPastTheEndOfItsFile;
    if (is_file && ::ftruncate(fd.get(), kSize / 2) != 0) ADD_FAILURE() << "truncate";
    const int flags = is_file ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
    memory_ = map(nullptr, kSize, flags, is_file ? fd.get() : -1);
    std::memset(memory_, 1, is_file ? kSize / 2 : kSize);
    std::byte* const middle = memory_ + kSize / 2;
    if (flaw == Flaw::kHole) ::mprotect(middle, kPage, PROT_NONE);
    if (flaw == Flaw::kGuard) has_flaw_ = ::madvise(middle, kPage, kInstallGuard) == 0;
    if (flaw == Flaw::kReadOnly) ::mprotect(middle, kSize / 2, PROT_READ);
    if (flaw == Flaw::kNoAccess) ::mprotect(middle, kSize / 2, PROT_NONE);
    if (flaw == Flaw::kTurnsIntoAFile) map(middle, kSize / 2, MAP_PRIVATE | MAP_FIXED, fd.get());
  }
  ~FlawedMemory() {
    if (memory_) ::munmap(memory_, kSize);
  }
  FlawedMemory(const FlawedMemory&) = delete;
  FlawedMemory& operator=(const FlawedMemory&) = delete;

  /// False where the kernel has no such flaw: guards are there from Linux 6.13 on.
  bool has_flaw() const { return has_flaw_; }

  /// `size` bytes around the middle.
  std::byte* around_the_middle(std::size_t size) {
    return memory_ ? memory_ + kSize / 2 - size / 2 : reinterpret_cast<std::byte*>(kPage);
  }

  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kSize = 4 * kMiB;

 private:
  static constexpr int kInstallGuard = 102;  // MADV_GUARD_INSTALL, which headers of older kernels lack.

  static std::byte* map(std::byte* at, std::size_t size, int flags, int fd) {
    return static_cast<std::byte*>(::mmap(at, size, PROT_READ | PROT_WRITE, flags, fd, 0));
  }

  std::byte* memory_ = nullptr;
  bool has_flaw_ = true;
};

class FlawedMemoryTest : public ::testing::TestWithParam<Flaw> {
 protected:
  FlawedMemoryTest() { testing::write_file(dir_ / "file", bytes_); }

  testing::TempDir dir_;
  std::vector<std::byte> bytes_ = testing::random_bytes(2 * kMiB);
  Engine engine_{{.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2}};
  // Less than a page; through slots; mostly in place; in place but for what a slot carries.
  static constexpr std::size_t kSizes[] = {100, 60'000, 300'000, kMiB + 4096};
};

INSTANTIATE_TEST_SUITE_P(Flaws, FlawedMemoryTest,
                         ::testing::Values(Flaw::kNoAccess, Flaw::kReadOnly, Flaw::kUnmapped, Flaw::kHole, Flaw::kGuard,
                                           Flaw::kPastTheEndOfItsFile, Flaw::kTurnsIntoAFile),
                         [](const auto& flaw) { return name_of(flaw.param); });

TEST_P(FlawedMemoryTest, ALoadIntoItIsAnErrorHoweverTheBytesGoThere) {
  FlawedMemory memory(GetParam(), dir_ / "mapped");
  if (!memory.has_flaw()) GTEST_SKIP() << "no guards before Linux 6.13";
  for (const CachePolicy cache : {CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered}) {
    for (const std::size_t size : kSizes) {
      for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{9}}) {
        const Extent extent{offset, size, memory.around_the_middle(size)};
        try {
          engine_.load({.files = {{.path = dir_ / "file", .extents = {extent}}}, .cache = cache});
          ADD_FAILURE() << size << " bytes at " << offset;
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), std::errc::bad_address) << error.what();
        }
      }
    }
  }
}

TEST_P(FlawedMemoryTest, AStoreFromItIsAnErrorHoweverTheBytesComeFromThere) {
  if (GetParam() == Flaw::kReadOnly) return;  // This is none for a store.
  FlawedMemory memory(GetParam(), dir_ / "mapped");
  if (!memory.has_flaw()) GTEST_SKIP() << "no guards before Linux 6.13";
  for (const bool checksums : {false, true}) {
    for (const std::size_t size : kSizes) {
      for (const unsigned phase : {0u, 1u}) {
        FileWriter writer = engine_.create(dir_ / "written", {.checksums = checksums});
        try {
          writer.write(
              {.extents = {{.offset_bytes = 0, .size_bytes = size, .source = memory.around_the_middle(size) + phase}}});
          ADD_FAILURE() << size << " bytes, phase " << phase;
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), std::errc::bad_address) << error.what();
        }
      }
    }
  }
  EXPECT_FALSE(std::filesystem::exists(dir_ / "written"));
}

}  // namespace
}  // namespace flashpack
