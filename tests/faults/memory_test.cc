// Loads into memory that cannot be written to, and stores from memory that cannot be read.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::kMiB;

enum class Flaw { kNoAccess, kReadOnly, kUnmapped, kHole, kPastTheEndOfItsFile };

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
    case Flaw::kPastTheEndOfItsFile:
      return "PastTheEndOfItsFile";
  }
  return "";
}

/// Memory with a flaw from its middle on; a hole is in its middle alone, and what is not mapped is so from the start.
class FlawedMemory {
 public:
  FlawedMemory(Flaw flaw, const std::filesystem::path& file) {
    if (flaw == Flaw::kUnmapped) return;
    const int fd = flaw == Flaw::kPastTheEndOfItsFile ? ::open(file.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600) : -1;
    if (fd >= 0 && ::ftruncate(fd, kSize / 2) != 0) ADD_FAILURE() << "truncate";
    const int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
    memory_ = static_cast<std::byte*>(::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, flags, fd, 0));
    ::close(fd);
    std::memset(memory_, 1, fd >= 0 ? kSize / 2 : kSize);
    std::byte* const middle = memory_ + kSize / 2;
    if (flaw == Flaw::kHole) ::mprotect(middle, kPage, PROT_NONE);
    if (flaw == Flaw::kReadOnly) ::mprotect(middle, kSize / 2, PROT_READ);
    if (flaw == Flaw::kNoAccess) ::mprotect(middle, kSize / 2, PROT_NONE);
  }
  ~FlawedMemory() {
    if (memory_) ::munmap(memory_, kSize);
  }
  FlawedMemory(const FlawedMemory&) = delete;
  FlawedMemory& operator=(const FlawedMemory&) = delete;

  /// `size` bytes around the middle.
  std::byte* around_the_middle(std::size_t size) {
    return memory_ ? memory_ + kSize / 2 - size / 2 : reinterpret_cast<std::byte*>(kPage);
  }

  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kSize = 4 * kMiB;

 private:
  std::byte* memory_ = nullptr;
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
                         ::testing::Values(Flaw::kNoAccess, Flaw::kReadOnly, Flaw::kUnmapped, Flaw::kHole,
                                           Flaw::kPastTheEndOfItsFile),
                         [](const auto& flaw) { return name_of(flaw.param); });

TEST_P(FlawedMemoryTest, ALoadIntoItIsAnErrorHoweverTheBytesGoThere) {
  FlawedMemory memory(GetParam(), dir_ / "mapped");
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
