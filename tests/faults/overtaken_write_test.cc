// Loads of a file that somebody is writing to in place, with a single pwrite that takes as long as the test wants.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <future>
#include <memory>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/hanging_fs.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

constexpr std::size_t kFileBytes = std::size_t{2} << 20;
constexpr unsigned kMappedSeed = 2;

// A file of a HangingFs in private memory: whoever touches it first waits while its reads are held.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path) {
    testing::write_file(path, testing::random_bytes(kFileBytes, kMappedSeed));
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    address_ = ::mmap(nullptr, kFileBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    ::close(fd);
    if (address_ == MAP_FAILED) throw std::runtime_error("mmap " + path.string());
  }
  ~MappedFile() { ::munmap(address_, kFileBytes); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  void* data() const { return address_; }

 private:
  void* address_ = nullptr;
};

class OvertakenWriteTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::write_file(path_, testing::random_bytes(kFileBytes));
    fs_ = std::make_unique<testing::HangingFs>(FLASHPACK_HANGING_FS, dir_ / "fuse");
    if (!fs_->mounted()) GTEST_SKIP() << "FUSE cannot be mounted here";
    source_ = std::make_unique<MappedFile>(*fs_ / "source");
  }

  // Comes to the first byte and no further, until "source" is released.
  std::future<void> begin_to_write() {
    fs_->hold("read", "source");
    auto written = std::async(std::launch::async, [this] {
      const int fd = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
      EXPECT_EQ(::pwrite(fd, source_->data(), kFileBytes, 0), static_cast<ssize_t>(kFileBytes));
      ::close(fd);
    });
    EXPECT_TRUE(fs_->wait_until_held("read", "source"));
    return written;
  }

  LoadRequest request(void* target, const Checksums* checksums = nullptr) const {
    return {.files = {{.path = path_, .extents = {{0, kFileBytes, target}}, .checksums = checksums}},
            .cache = CachePolicy::kBuffered};
  }

  static std::error_code outcome(Transfer transfer) {
    try {
      transfer.wait();
      return {};
    } catch (const Error& error) {
      return error.code();
    }
  }

  testing::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "file";
  Engine engine_{{.workers = 2}};
  std::unique_ptr<testing::HangingFs> fs_;
  std::unique_ptr<MappedFile> source_;
};

TEST_F(OvertakenWriteTest, AWriteThatBeginsDuringALoadIsSeenThoughItHasNotEnded) {
  const MappedFile target(*fs_ / "target");
  fs_->hold("read", "target");
  Transfer transfer = engine_.start_load(request(target.data()));
  EXPECT_TRUE(fs_->wait_until_held("read", "target"));
  const auto written = begin_to_write();
  fs_->release("read", "target");
  EXPECT_EQ(outcome(std::move(transfer)), Errc::kFileChanged);
  fs_->release();
}

// Nothing that the kernel tells shows it, so that without checksums the load is held for a good one.
TEST_F(OvertakenWriteTest, AWriteThatBeganBeforeTheLoadIsSeenByChecksumsAlone) {
  FileWriter writer = engine_.create(dir_ / "new", {.checksums = true});
  const auto what_is_written =
      testing::random_bytes(kFileBytes, kMappedSeed);  // Not the mapping: touched, it is there.
  writer.write({.extents = {{0, kFileBytes, what_is_written.data()}}});
  const Checksums of_what_is_written = writer.checksums();
  std::vector<std::byte> target(kFileBytes);
  auto written = begin_to_write();
  EXPECT_EQ(outcome(engine_.start_load(request(target.data()))), std::error_code());
  EXPECT_EQ(outcome(engine_.start_load(request(target.data(), &of_what_is_written))), Errc::kCorrupt);
  fs_->release();
  written.wait();
  EXPECT_EQ(outcome(engine_.start_load(request(target.data(), &of_what_is_written))), std::error_code());
}

}  // namespace
}  // namespace flashpack
