#include "engine/temp_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "flashpack/error.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using testing::TempDir;

constexpr std::string_view kRandom = "0123456789abcdef";

class TempFileTest : public ::testing::Test {
 protected:
  std::set<std::string> entries() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(dir_.path())) names.insert(entry.path().filename());
    return names;
  }
  void touch(const std::string& name) const { testing::write_file(dir_ / name, {}); }
  std::string left_name(std::string_view random = kRandom) const {
    return ".model." + std::string(random) + std::string(".tmp");
  }

  TempDir dir_;
  std::filesystem::path target_ = dir_ / "model";
};

TEST_F(TempFileTest, WhatADeadWriterLeftIsRemovedByTheNextOneForTheSamePath) {
  for (const auto random : {"0000000000000000", "vvvvvvvvvvvvvvvv"}) touch(left_name(random));
  TempFile next(target_);
  const UniqueFd fd = next.create();
  EXPECT_EQ(entries(), std::set<std::string>{next.path().filename()});
  next.remove();
  EXPECT_TRUE(entries().empty());
}

TEST_F(TempFileTest, TheFileGoesWithItsObjectUnlessItIsInPlaceOrTheObjectIsAForkedChildsCopy) {
  {
    TempFile file(target_);
    const UniqueFd fd = file.create();
    const int status = testing::run_in_child([&] {
      file.~TempFile();
      return 0;
    });
    EXPECT_EQ(status, 0);
    EXPECT_EQ(entries().size(), 1u);
  }
  EXPECT_TRUE(entries().empty());
  {
    TempFile file(target_);
    const UniqueFd fd = file.create();
    file.commit(fd.get());
  }
  EXPECT_EQ(entries(), std::set<std::string>{"model"});
}

TEST_F(TempFileTest, WhatMayNotBeWrittenToIsRemovedAllTheSame) {
  touch(left_name());
  ::chmod((dir_ / left_name()).c_str(), 0444);
  TempFile next(target_);
  const UniqueFd fd = next.create();
  EXPECT_EQ(entries().size(), 1u);
}

TEST_F(TempFileTest, OnlyNamesThatAreExactlyItsOwnAreTouched) {
  const std::set<std::string> others = {"model",
                                        ".model",
                                        ".model.tmp",
                                        "model.0123456789abcdef.tmp",
                                        ".model.0123456789abcde.tmp",
                                        ".model.0123456789abcdef0.tmp",
                                        ".model.0123456789abcdeF.tmp",
                                        ".model.0123456789abcdef.tmp~",
                                        ".model.0123456789abcdef.bak",
                                        ".model.a.0123456789abcdef.tmp",
                                        ".model2.0123456789abcdef.tmp"};
  for (const std::string& name : others) touch(name);
  std::filesystem::create_directory(dir_ / left_name("0000000000000001"));
  ASSERT_EQ(::mkfifo((dir_ / left_name("0000000000000002")).c_str(), 0600), 0);
  std::filesystem::create_symlink("model", dir_ / left_name("0000000000000003"));
  TempFile next(target_);
  const UniqueFd fd = next.create();
  next.remove();
  auto left = entries();
  EXPECT_EQ(left.size(), others.size() + 3);
  for (const std::string& name : others) EXPECT_TRUE(left.contains(name)) << name;
}

TEST_F(TempFileTest, WhatSomebodyWritesIsLeftAlone) {
  TempFile first(target_);
  const UniqueFd first_fd = first.create();
  TempFile second(target_);
  const UniqueFd second_fd = second.create();
  EXPECT_NE(first.path(), second.path());
  EXPECT_EQ(entries().size(), 2u);
  first.commit(first_fd.get());
  second.commit(second_fd.get());
  EXPECT_EQ(entries(), std::set<std::string>{"model"});
}

TEST_F(TempFileTest, AnotherDescriptorOfTheFileThatIsClosedLeavesItLocked) {
  TempFile first(target_);
  const UniqueFd fd = first.create();
  ::close(::open(first.path().c_str(), O_WRONLY));
  ::close(::dup(fd.get()));
  TempFile second(target_);
  const UniqueFd second_fd = second.create();
  EXPECT_TRUE(std::filesystem::exists(first.path()));
}

TEST_F(TempFileTest, WhatIsLockedByAnyoneIsInUse) {
  touch(left_name());
  const UniqueFd other(::open((dir_ / left_name()).c_str(), O_RDONLY));
  ASSERT_EQ(::flock(other.get(), LOCK_SH), 0);
  TempFile next(target_);
  const UniqueFd fd = next.create();
  EXPECT_EQ(entries().size(), 2u);
}

// Between the creation of a file and its lock another thread may lock it, or remove it, or both.
TEST_F(TempFileTest, ManyAtATimeNeverLoseTheirFiles) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        TempFile file(target_);
        const UniqueFd fd = file.create();
        if (round % 2) std::this_thread::yield();
        EXPECT_NO_THROW(file.commit(fd.get()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(entries(), std::set<std::string>{"model"});
}

TEST_F(TempFileTest, FollowsTheDirectoryThatIsRenamed) {
  std::filesystem::create_directory(dir_ / "before");
  TempFile file(dir_ / "before" / "model");
  const UniqueFd fd = file.create();
  std::filesystem::rename(dir_ / "before", dir_ / "after");
  file.commit(fd.get());
  EXPECT_TRUE(std::filesystem::exists(dir_ / "after" / "model"));
}

TEST_F(TempFileTest, LinksAreFollowedToWhatIsThereOrIsNotYet) {
  std::filesystem::create_directory(dir_ / "sub");
  std::filesystem::create_symlink("sub/second", dir_ / "first");
  std::filesystem::create_symlink("../third", dir_ / "sub" / "second");
  const auto resolved = resolve_links(dir_ / "first");
  testing::write_file(resolved, {});
  EXPECT_TRUE(std::filesystem::exists(dir_ / "third"));
  EXPECT_EQ(resolve_links(dir_ / "third"), dir_ / "third");
  std::filesystem::create_symlink(dir_ / "absolute", dir_ / "third link");
  EXPECT_EQ(resolve_links(dir_ / "third link"), dir_ / "absolute");
}

TEST_F(TempFileTest, OpenFilesAreReplacedByNameOrNotAtAll) {
  flashpack::testing::write_file(dir_ / "file", std::vector<std::byte>(5));
  const UniqueFd named(::open((dir_ / "file").c_str(), O_RDWR | O_CLOEXEC));
  const UniqueFd nameless(::open(dir_.path().c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  const UniqueFd in_memory(::memfd_create("memory", MFD_CLOEXEC));
  ASSERT_TRUE(named && in_memory);
  const auto link_to = [](const UniqueFd& fd) { return "/proc/self/fd/" + std::to_string(fd.get()); };
  EXPECT_EQ(resolve_links(link_to(named)), dir_ / "file");
  std::filesystem::create_symlink(link_to(in_memory), dir_ / "link");
  std::vector<std::string> refused = {link_to(in_memory), dir_ / "link"};
  if (nameless) refused.push_back(link_to(nameless));
  for (const std::string& path : refused) {
    try {
      ADD_FAILURE() << resolve_links(path);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kInvalidArgument) << error.what();
      EXPECT_EQ(error.path(), path);
    }
  }
  // Its text is the name of another file now.
  ::unlink((dir_ / "file").c_str());
  flashpack::testing::write_file(dir_ / "file (deleted)", std::vector<std::byte>(5));
  EXPECT_THROW(resolve_links(link_to(named)), Error);
}

TEST_F(TempFileTest, ACircleOfLinksIsAnError) {
  std::filesystem::create_symlink("b", dir_ / "a");
  std::filesystem::create_symlink("a", dir_ / "b");
  try {
    resolve_links(dir_ / "a");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::too_many_symbolic_link_levels);
    EXPECT_EQ(error.path(), dir_ / "a");
  }
}

// All of them can be opened for writing, and rename(2) would replace each of them by a file.
TEST_F(TempFileTest, DevicesAndPipesAreNotReplaced) {
  ASSERT_EQ(::mkfifo((dir_ / "pipe").c_str(), 0600), 0);
  for (const std::filesystem::path& path : {std::filesystem::path("/dev/null"), dir_ / "pipe"}) {
    try {
      TempFile refused(path);
      FAIL() << path;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kInvalidArgument);
      EXPECT_EQ(error.path(), path);
    }
  }
}

TEST_F(TempFileTest, PathsThatEndWithASlashOrDotsAreDirectories) {
  for (const char* name : {"none/", ".", "..", "/"}) {
    try {
      TempFile refused(resolve_links(name == std::string("/") ? std::filesystem::path(name) : dir_ / name));
      FAIL() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), std::errc::is_a_directory) << name;
    }
  }
  EXPECT_THROW(resolve_links(""), Error);
}

// Some file systems take no name that is not UTF-8.
TEST_F(TempFileTest, ALongNameIsNotCutInTheMiddleOfACharacter) {
  const auto characters = [](int number) {
    std::string text = "n";
    for (int i = 0; i < number; ++i) text += "\u00E9";
    return text;
  };
  TempFile file(dir_ / characters(127));
  const UniqueFd fd = file.create();
  EXPECT_TRUE(file.path().filename().string().starts_with("." + characters(99) + "."));
  TempFile of_no_characters(dir_ / std::string(255, '\x80'));
  EXPECT_NO_THROW(of_no_characters.create());
}

TEST_F(TempFileTest, WhatTakesTheTargetsPlaceMeanwhileIsNotReplacedUnlessItIsAFile) {
  TempFile file(target_);
  const UniqueFd fd = file.create();
  std::filesystem::create_symlink("elsewhere", target_);
  EXPECT_THROW(file.commit(fd.get()), Error);
  std::filesystem::remove(target_);
  ASSERT_EQ(::mkfifo(target_.c_str(), 0600), 0);
  EXPECT_THROW(file.commit(fd.get()), Error);
}

TEST_F(TempFileTest, AReplacedFileIsWholeAndALinkToItStays) {
  std::filesystem::create_symlink("model", dir_ / "link");
  for (const std::string bytes : {"first", "second, which is longer", ""}) {
    replace_file(dir_ / "link", bytes);
    const auto written = testing::read_file(target_);
    EXPECT_EQ(std::string(reinterpret_cast<const char*>(written.data()), written.size()), bytes);
  }
  EXPECT_EQ(entries(), (std::set<std::string>{"link", "model"}));
}

TEST_F(TempFileTest, AFileWhoseReplacementIsCutShortStaysAsItWas) {
  replace_file(target_, "before");
  const int error = testing::run_in_child([this] {
    const rlimit few_bytes{3, 3};
    if (::signal(SIGXFSZ, SIG_IGN) == SIG_ERR || ::setrlimit(RLIMIT_FSIZE, &few_bytes) != 0) return testing::kSkip;
    try {
      replace_file(target_, "after");
    } catch (const Error& refused) {
      return refused.path() == target_ ? refused.code().value() : -1;
    }
    return 0;
  });
  EXPECT_EQ(error, EFBIG) << "the first write is short, and the next one says why";
  EXPECT_EQ(testing::read_file(target_).size(), 6u);
  EXPECT_EQ(entries(), std::set<std::string>{"model"});
}

class ReplacedAccessTest : public TempFileTest {
 protected:
  struct stat replace(uid_t owner, gid_t group, mode_t mode) const {
    testing::write_file(target_, {});
    EXPECT_EQ(::chown(target_.c_str(), owner, group), 0);
    EXPECT_EQ(::chmod(target_.c_str(), mode), 0);
    TempFile file(target_);
    const UniqueFd fd = file.create();
    struct stat status{};
    EXPECT_EQ(::fstat(fd.get(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777, 0600u) << "until it is whole it is nobody else's business";
    file.commit(fd.get());
    EXPECT_EQ(::stat(target_.c_str(), &status), 0);
    return status;
  }
};

TEST_F(ReplacedAccessTest, TheModeIsKeptWithoutWhatLetsProgramsRunAsOthers) {
  EXPECT_EQ(replace(::geteuid(), ::getegid(), 0754).st_mode & 07777, 0754u);
  EXPECT_EQ(replace(::geteuid(), ::getegid(), 04751).st_mode & 07777, 0751u);
  EXPECT_EQ(replace(::geteuid(), ::getegid(), 0).st_mode & 07777, 0u);
}

TEST_F(ReplacedAccessTest, WhatIsMadePrivateWhileItsReplacementIsWrittenStaysPrivate) {
  const auto mode_after = [this](TempFile& file) {
    const UniqueFd fd = file.create();
    testing::write_file(target_, {});
    EXPECT_EQ(::chmod(target_.c_str(), 0600), 0);
    file.commit(fd.get());
    struct stat status{};
    EXPECT_EQ(::stat(target_.c_str(), &status), 0);
    return status.st_mode & 07777;
  };
  TempFile first(target_);
  EXPECT_EQ(mode_after(first), 0600u);
  ASSERT_EQ(::chmod(target_.c_str(), 0644), 0);
  TempFile second(target_);
  EXPECT_EQ(mode_after(second), 0600u);
}

TEST_F(ReplacedAccessTest, TheModeOutlivesTheFileThatHadIt) {
  touch("model");
  ASSERT_EQ(::chmod(target_.c_str(), 0640), 0);
  TempFile file(target_);
  const UniqueFd fd = file.create();
  std::filesystem::remove(target_);
  file.commit(fd.get());
  struct stat status{};
  ASSERT_EQ(::fstat(fd.get(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0640u);
}

TEST_F(ReplacedAccessTest, RootKeepsOwnerAndGroup) {
  if (::geteuid() != 0) GTEST_SKIP() << "not root";
  const struct stat status = replace(12345, 23456, 0640);
  EXPECT_EQ(status.st_uid, 12345u);
  EXPECT_EQ(status.st_gid, 23456u);
  EXPECT_EQ(status.st_mode & 07777, 0640u);
}

}  // namespace
}  // namespace flashpack::internal
