/// Loads from all that may be given in place of the path of a file.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <string>

#include "engine/ground/unique_fd.h"
#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/loop_device.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using internal::UniqueFd;
using testing::GuardedMemory;
using testing::kMiB;

constexpr std::array kPolicies{CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered};

class SourcesTest : public ::testing::Test {
 protected:
  SourcesTest() { testing::write_file(path_, bytes_); }

  /// Loads all bytes from the source under each policy, in place and through slots.
  void expect_bytes(const FileExtents& source, std::uint64_t base = 0) {
    for (const CachePolicy cache : kPolicies) {
      for (const std::size_t phase : {std::size_t{base % 4096}, std::size_t{77}}) {
        GuardedMemory memory(bytes_.size(), phase);
        FileExtents wanted = source;
        wanted.extents = {{base, memory.size(), memory.data()}};
        Transfer load = engine_.start_load({.files = {wanted}, .cache = cache});
        ASSERT_NO_THROW(load.wait()) << source.path;
        ASSERT_TRUE(memory.intact());
        ASSERT_TRUE(testing::same_bytes(memory.data(), bytes_.data(), bytes_.size())) << source.path;
      }
    }
  }
  void expect_bytes_of(int fd) {
    ASSERT_GE(fd, 0);
    expect_bytes({.path = "descriptor", .fd = fd});
    expect_bytes({.path = "/proc/self/fd/" + std::to_string(fd)});
  }
  void fill(int fd) const { ASSERT_EQ(::write(fd, bytes_.data(), bytes_.size()), static_cast<ssize_t>(bytes_.size())); }

  std::string refusal_of(const FileExtents& source) {
    GuardedMemory memory(10);
    FileExtents wanted = source;
    wanted.extents = {{0, memory.size(), memory.data()}};
    try {
      engine_.load({.files = {wanted}});
    } catch (const Error& error) {
      EXPECT_EQ(error.path(), source.path);
      return error.what();
    }
    return "no error";
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::vector<std::byte> bytes_ = testing::random_bytes(3 * kMiB + 5 * 512);
  Engine engine_{{.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2}};
};

TEST_F(SourcesTest, MemoryThatIsAFile) {
  const UniqueFd fd(::memfd_create("weights", MFD_CLOEXEC));
  ASSERT_TRUE(fd);
  fill(fd.get());
  expect_bytes_of(fd.get());
}

TEST_F(SourcesTest, SealedMemoryThatIsAFile) {
  const UniqueFd fd(::memfd_create("weights", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_TRUE(fd);
  fill(fd.get());
  ASSERT_EQ(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE), 0);
  expect_bytes_of(fd.get());
}

TEST_F(SourcesTest, AFileThatNeverHadAName) {
  const UniqueFd fd(::open(dir_.path().c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!fd) GTEST_SKIP() << "no O_TMPFILE here: " << std::strerror(errno);
  fill(fd.get());
  expect_bytes_of(fd.get());
}

TEST_F(SourcesTest, AFileThatHasNoNameAnyMore) {
  const UniqueFd fd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  std::filesystem::remove(path_);
  expect_bytes_of(fd.get());
}

TEST_F(SourcesTest, DescriptorsWithOtherFlagsThanTheEnginesOwn) {
  for (const int flags : {O_RDWR, O_RDWR | O_APPEND, O_RDONLY | O_NONBLOCK, O_RDONLY | O_SYNC, O_RDONLY | O_NOATIME}) {
    const UniqueFd fd(::open(path_.c_str(), flags | O_CLOEXEC));
    expect_bytes_of(fd.get());
    EXPECT_EQ(::fcntl(fd.get(), F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK | O_SYNC | O_NOATIME), flags)
        << "the flags are the caller's";
  }
}

TEST_F(SourcesTest, ADescriptorForDirectReadsServesBufferedOnesToo) {
  const UniqueFd fd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
  if (!fd) GTEST_SKIP() << "no O_DIRECT here: " << std::strerror(errno);
  expect_bytes_of(fd.get());
  std::filesystem::remove(path_);
  expect_bytes_of(fd.get());
  EXPECT_NE(::fcntl(fd.get(), F_GETFL) & O_DIRECT, 0) << "the flags are the caller's";
}

TEST_F(SourcesTest, ADescriptorThatCameOverASocket) {
  std::array<int, 2> ends{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends.data()), 0);
  const UniqueFd sender(ends[0]);
  const UniqueFd receiver(ends[1]);
  UniqueFd sent(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  *header = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
  const int number = sent.get();
  std::memcpy(CMSG_DATA(header), &number, sizeof number);
  ASSERT_EQ(::sendmsg(sender.get(), &message, 0), 1);
  sent.reset();
  std::filesystem::remove(path_);
  ASSERT_EQ(::recvmsg(receiver.get(), &message, MSG_CMSG_CLOEXEC), 1);
  int received = -1;
  std::memcpy(&received, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof received);
  const UniqueFd fd(received);
  expect_bytes_of(fd.get());
}

TEST_F(SourcesTest, AFileInsideAContainerIsReadFromWhereItBegins) {
  for (const std::uint64_t base : {std::uint64_t{kMiB}, std::uint64_t{12'345}}) {
    std::vector<std::byte> container = testing::random_bytes(base, 2);
    container.insert(container.end(), bytes_.begin(), bytes_.end());
    container.resize(container.size() + 999);
    testing::write_file(dir_ / "container", container);
    expect_bytes({.path = dir_ / "container"}, base);
  }
}

TEST_F(SourcesTest, WhatIsNoFileIsRefusedByItsKind) {
  std::array<int, 2> pipe{};
  ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC), 0);
  const UniqueFd read_end(pipe[0]);
  const UniqueFd write_end(pipe[1]);
  const UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const UniqueFd directory(::open(dir_.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  EXPECT_EQ(refusal_of({.path = "x", .fd = read_end.get()}),
            "open (a FIFO or pipe, not a regular file) x: invalid argument");
  EXPECT_EQ(refusal_of({.path = "x", .fd = socket.get()}), "open (a socket, not a regular file) x: invalid argument");
  EXPECT_EQ(refusal_of({.path = "/dev/zero"}),
            "open (a character device, not a regular file) /dev/zero: invalid argument");
  EXPECT_EQ(refusal_of({.path = "x", .fd = directory.get()}), "open x: Is a directory");
}

class BlockDeviceTest : public SourcesTest {};

TEST_F(BlockDeviceTest, IsReadLikeAFileByPathAndByDescriptor) {
  const testing::LoopDevice device(path_);
  if (device.fd() < 0) GTEST_SKIP() << device.refusal();
  expect_bytes({.path = device.path()});
  expect_bytes_of(device.fd());
  const UniqueFd direct(::open(device.path().c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
  expect_bytes_of(direct.get());
}

TEST_F(BlockDeviceTest, IsReadPastThePageCacheWithItsOwnAlignment) {
  const testing::LoopDevice device(path_);
  if (device.fd() < 0) GTEST_SKIP() << device.refusal();
  GuardedMemory memory(bytes_.size());
  const TransferStats stats =
      engine_.load({.files = {{.path = device.path(), .extents = {{0, memory.size(), memory.data()}}}},
                    .cache = CachePolicy::kDirect});
  EXPECT_GE(stats.direct_bytes, bytes_.size());
  EXPECT_EQ(stats.buffered_bytes, 0u);
  EXPECT_EQ(stats.fallback_reason, "");
}

TEST_F(BlockDeviceTest, AnExtentPastItsEndIsTruncated) {
  const testing::LoopDevice device(path_);
  if (device.fd() < 0) GTEST_SKIP() << device.refusal();
  GuardedMemory memory(100);
  std::error_code error;
  Transfer load = engine_.start_load(
      {.files = {{.path = device.path(), .extents = {{bytes_.size() - 99, memory.size(), memory.data()}}}}}, nullptr,
      error);
  EXPECT_THROW(load.wait(), Error);
  EXPECT_EQ(load.error(), Errc::kTruncated);
}

TEST_F(BlockDeviceTest, ItsIdentityIsTheDeviceItsMediumAndItsSize) {
  testing::write_file(dir_ / "other", testing::random_bytes(bytes_.size(), 2));
  FileIdentity first;
  {
    const testing::LoopDevice device(path_);
    if (device.fd() < 0) GTEST_SKIP() << device.refusal();
    struct stat node{};
    ASSERT_EQ(::fstat(device.fd(), &node), 0);
    first = identity_of(device.fd()).value();
    EXPECT_EQ(first.dev, node.st_rdev);
    EXPECT_EQ(first.size_bytes, bytes_.size());
    EXPECT_EQ(first.mtime_ns, 0);
    const UniqueFd again(open_to_read(device.path()));
    EXPECT_EQ(identity_of(again.get()), first);
    // Another node leads to the same device.
    const auto other_node = dir_ / "node";
    if (::mknod(other_node.c_str(), S_IFBLK | 0600, node.st_rdev) == 0) {
      const UniqueFd by_other_node(open_to_read(other_node));
      EXPECT_TRUE(!by_other_node || identity_of(by_other_node.get()) == first);
    }
  }
  const testing::LoopDevice device(dir_ / "other");
  ASSERT_GE(device.fd(), 0) << device.refusal();
  if (first.ino == 0) GTEST_SKIP() << "this kernel does not number its media";
  EXPECT_NE(identity_of(device.fd()), first) << "another file is behind it now";
}

TEST_F(BlockDeviceTest, ALoadThatExpectsTheMediumThatWasThereIsRefused) {
  const testing::LoopDevice device(path_);
  if (device.fd() < 0) GTEST_SKIP() << device.refusal();
  const auto expected = identity_of(device.fd());
  expect_bytes({.path = device.path(), .expected = expected});
  std::filesystem::resize_file(path_, 2 * kMiB);
  if (!device.resize()) GTEST_SKIP() << "a loop device that keeps its size";
  GuardedMemory memory(100);
  const FileExtents changed{.path = device.path(), .extents = {{0, 100, memory.data()}}, .expected = expected};
  Transfer load = engine_.start_load({.files = {changed}});
  EXPECT_THROW(load.wait(), Error);
  EXPECT_EQ(load.error(), Errc::kFileChanged);
}

TEST_F(BlockDeviceTest, ANodeWithoutADeviceIsAnErrorWithItsPath) {
  const auto node = dir_ / "node";
  if (::mknod(node.c_str(), S_IFBLK | 0600, ::makedev(240, 77)) != 0) GTEST_SKIP() << "no nodes may be made here";
  EXPECT_NE(refusal_of({.path = node}).find("open " + node.string()), std::string::npos);
}

TEST_F(BlockDeviceTest, IsNotWrittenTo) {
  const auto node = dir_ / "node";
  if (::mknod(node.c_str(), S_IFBLK | 0600, ::makedev(240, 77)) != 0) GTEST_SKIP() << "no nodes may be made here";
  try {
    engine_.create(node);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kInvalidArgument);
    EXPECT_EQ(std::string(error.what()),
              "create (a block device, not a regular file) " + node.string() + ": invalid argument");
  }
}

}  // namespace
}  // namespace flashpack
