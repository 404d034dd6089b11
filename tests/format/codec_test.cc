#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <functional>

#include "engine/ground/unique_fd.h"
#include "tests/format/golden_files.h"
#include "tests/support/lease_holder.h"
#include "torch_binding/format/codec.h"

namespace {

/// What the next preads do; empty: what the system does.
std::function<ssize_t(int fd, void* target, size_t size_bytes, off_t offset_bytes)> pread_hook;

ssize_t system_pread(int fd, void* target, size_t size_bytes, off_t offset_bytes) {
  return syscall(SYS_pread64, fd, target, size_bytes, offset_bytes);
}

}  // namespace

// Stands before libc's in this program.
extern "C" __attribute__((visibility("default"))) ssize_t pread(int fd, void* target, size_t size_bytes,
                                                                off_t offset_bytes) {
  return pread_hook ? pread_hook(fd, target, size_bytes, offset_bytes)
                    : system_pread(fd, target, size_bytes, offset_bytes);
}

namespace flashpack {
namespace {

std::string trailer(std::uint64_t json_bytes) {
  std::string bytes(sizeof json_bytes, '\0');
  std::memcpy(bytes.data(), &json_bytes, sizeof json_bytes);
  return bytes + std::string("FLASHPK\0", 8);
}

/// A safetensors file.
std::string safetensors(const std::string& json, const std::string& payload) {
  return trailer(json.size()).substr(0, sizeof(std::uint64_t)) + json + payload;
}

const std::string kSafetensors = safetensors(R"({"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "abcd");

class ReadMetadata : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "flashpack_XXXXXX";
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    path_ = directory_ / "model.flashpack";
  }
  void TearDown() override {
    pread_hook = nullptr;
    std::filesystem::remove_all(directory_);
  }

  void write(const std::string& bytes) const {
    std::ofstream(path_, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  void write_golden() const { write(test::file_bytes(test::golden_files().front().path())); }

  std::string error_of(const std::filesystem::path& path, std::error_code expected,
                       const ReadMetadataOptions& options = {}) const {
    try {
      read_metadata(path, options);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), expected) << error.what();
      EXPECT_EQ(error.path(), path);
      EXPECT_NE(std::string(error.what()).find(path.string()), std::string::npos) << error.what();
      return error.what();
    }
    return "accepted";
  }
  std::string refusal_of(const std::string& bytes, const ReadMetadataOptions& options = {}) const {
    write(bytes);
    return error_of(path_, Errc::kBadFile, options);
  }

  std::filesystem::path directory_;
  std::filesystem::path path_;
};

std::error_code system_error(int value) { return {value, std::generic_category()}; }

TEST_F(ReadMetadata, SaysThatAFileIsMissing) { EXPECT_NE(error_of(path_, system_error(ENOENT)), "accepted"); }

TEST_F(ReadMetadata, SaysThatAPathIsADirectory) { EXPECT_NE(error_of(directory_, system_error(EISDIR)), "accepted"); }

TEST_F(ReadMetadata, SaysThatAPathGoesThroughAFile) {
  write_golden();
  EXPECT_NE(error_of(path_ / "model.flashpack", system_error(ENOTDIR)), "accepted");
}

TEST_F(ReadMetadata, SaysThatAFileMayNotBeRead) {
  write_golden();
  ASSERT_EQ(::chmod(path_.c_str(), 0), 0);
  constexpr uid_t kNobody = 65534;
  const bool root = ::geteuid() == 0;  // Who may read everything.
  if (root) ::setfsuid(kNobody);
  EXPECT_NE(error_of(path_, system_error(EACCES)), "accepted");
  if (root) ::setfsuid(0);
}

TEST_F(ReadMetadata, DoesNotWaitForAFifosWriter) {
  ASSERT_EQ(::mkfifo(path_.c_str(), 0600), 0);
  EXPECT_NE(error_of(path_, Errc::kBadFile).find("not a regular file"), std::string::npos);
}

TEST_F(ReadMetadata, WaitsForAFileWithAWriteLeaseAsOpenDoes) {
  write_golden();
  const testing::LeaseHolder holder(path_);
  if (!holder.holds()) GTEST_SKIP() << "no leases on this file system";
  EXPECT_FALSE(read_metadata(path_).records.empty());
}

TEST_F(ReadMetadata, RefusesAFileTooSmallForATrailer) {
  for (const std::string& bytes : {std::string(), std::string("FLASHPK\0", 8), trailer(0).substr(1)}) {
    EXPECT_NE(refusal_of(bytes).find("File too small to contain footer"), std::string::npos);
  }
  EXPECT_NE(refusal_of("").find("0 bytes: it is empty"), std::string::npos);
  EXPECT_NE(refusal_of("404 not found").find("13 bytes: it is a text"), std::string::npos);
}

TEST_F(ReadMetadata, RefusesATrailerWithoutAFooter) {
  EXPECT_NE(refusal_of(trailer(0)).find("the footer is not valid JSON"), std::string::npos);
}

TEST_F(ReadMetadata, RefusesAnotherMagic) {
  const std::string error = refusal_of(std::string(100, 'x') + "\xff");
  EXPECT_NE(error.find(R"(Bad magic: "xxxxxxx\xff" != "FLASHPK\x00")"), std::string::npos) << error;
}

TEST_F(ReadMetadata, RefusesAFooterLongerThanTheFile) {
  for (const std::uint64_t json_bytes : {std::uint64_t{3}, std::uint64_t{18}, ~std::uint64_t{0}, ~std::uint64_t{15}}) {
    EXPECT_NE(refusal_of("{}" + trailer(json_bytes)).find("Corrupt footer length"), std::string::npos) << json_bytes;
  }
}

TEST_F(ReadMetadata, RefusesAFooterOverTheLimitBeforeReadingIt) {
  write(std::string(1000, ' ') + trailer(1000));
  int reads = 0;
  pread_hook = [&](auto... arguments) { return ++reads, system_pread(arguments...); };
  EXPECT_NE(error_of(path_, Errc::kBadFile, {.max_footer_bytes = 999}).find("over the limit of 999"),
            std::string::npos);
  EXPECT_EQ(reads, 1);
}

TEST_F(ReadMetadata, AProgramMayRaiseTheLimitForFooters) {
  write("");
  std::filesystem::resize_file(path_, kMaxFooterBytes + 1);  // A sparse file, which takes no room on the disk.
  std::ofstream(path_, std::ios::app | std::ios::binary) << trailer(kMaxFooterBytes + 1);
  EXPECT_NE(error_of(path_, Errc::kBadFile, {}).find("over the limit of 268435456"), std::string::npos);
  EXPECT_EQ(error_of(path_, Errc::kBadFile, {.max_footer_bytes = kMaxFooterBytes + 1}).find("over the limit"),
            std::string::npos);
}

TEST_F(ReadMetadata, FooterAtTheLimitIsRead) {
  write_golden();
  const std::uint64_t json_bytes = std::filesystem::file_size(path_) - read_metadata(path_).payload_bytes - 16;
  EXPECT_NO_THROW(read_metadata(path_, {.max_footer_bytes = json_bytes}));
  EXPECT_THROW(read_metadata(path_, {.max_footer_bytes = json_bytes - 1}), Error);
}

TEST_F(ReadMetadata, FootersOfAnyLengthAroundTheFirstReadAreWhole) {
  const std::string golden = test::file_bytes(test::golden_files().front().path());
  const Metadata expected = read_metadata(test::golden_files().front().path());
  const std::string payload = golden.substr(0, expected.payload_bytes);
  const std::string json = golden.substr(payload.size(), golden.size() - payload.size() - 16);
  constexpr std::size_t kFirstReadBytes = std::size_t{64} << 10;
  for (std::size_t size = kFirstReadBytes - 30; size < kFirstReadBytes + 3; ++size) {
    write(payload + json + std::string(size - json.size(), ' ') + trailer(size));
    EXPECT_EQ(encode_footer(read_metadata(path_)), encode_footer(expected)) << size;
  }
}

TEST_F(ReadMetadata, ShortAndInterruptedReadsAreResumed) {
  std::string json = R"({"format":"flashpack_v3","target_dtype":"int8","align_bytes":0,"total_elems":4,"index":[]})";
  json.insert(1, 200'000, ' ');
  write("abcd" + json + trailer(json.size()));
  int calls = 0;
  pread_hook = [&](int fd, void* target, size_t size_bytes, off_t offset_bytes) -> ssize_t {
    if (++calls % 3 == 0) return errno = EINTR, -1;
    return system_pread(fd, target, std::min<size_t>(size_bytes, 1009), offset_bytes);
  };
  EXPECT_EQ(read_metadata(path_).container.total_elems, 4U);
}

TEST_F(ReadMetadata, ReadErrorKeepsItsErrnoAndOffset) {
  write_golden();
  pread_hook = [](auto...) -> ssize_t { return errno = EIO, -1; };
  const std::string error = error_of(path_, system_error(EIO));
  EXPECT_NE(error.find(" at 0+208: "), std::string::npos) << error;
}

TEST_F(ReadMetadata, FileThatShrinksWhileItIsReadIsTruncated) {
  write_golden();
  pread_hook = [this](auto... arguments) {
    std::filesystem::resize_file(path_, 0);
    return system_pread(arguments...);
  };
  EXPECT_NE(error_of(path_, Errc::kTruncated).find("short read"), std::string::npos);
}

TEST_F(ReadMetadata, FileThatIsWrittenWhileItIsReadIsAnError) {
  write_golden();
  pread_hook = [this](auto... arguments) {
    const ssize_t got = system_pread(arguments...);
    const timespec times[2] = {{1, 0}, {1, 0}};
    EXPECT_EQ(::utimensat(AT_FDCWD, path_.c_str(), times, 0), 0);
    return got;
  };
  EXPECT_NE(error_of(path_, Errc::kFileChanged), "accepted");
}

TEST_F(ReadMetadata, FileThatIsReplacedWhileItIsReadIsReadAsItWas) {
  write_golden();
  pread_hook = [this](auto... arguments) {
    std::filesystem::copy_file(test::golden_files()[1].path(), directory_ / "new",
                               std::filesystem::copy_options::overwrite_existing);
    std::filesystem::rename(directory_ / "new", path_);
    return system_pread(arguments...);
  };
  struct stat before{};
  ASSERT_EQ(::stat(path_.c_str(), &before), 0);
  const Metadata metadata = read_metadata(path_);
  EXPECT_EQ(metadata.identity.ino, before.st_ino);
  EXPECT_EQ(metadata.records.front().name, test::golden_files().front().tensors.front().name);
}

TEST_F(ReadMetadata, SafetensorsFileIsReadWhateverItsName) {
  write(kSafetensors);
  const Metadata metadata = read_metadata(path_);
  EXPECT_EQ(metadata.format, FileFormat::kSafetensors);
  EXPECT_EQ(metadata.payload_bytes, kSafetensors.size());
  EXPECT_EQ(metadata.identity.size_bytes, kSafetensors.size());
  EXPECT_EQ(metadata.records.at(0).offset_bytes, kSafetensors.size() - 4);
}

TEST_F(ReadMetadata, SmallestSafetensorsFileIsSmallerThanATrailer) {
  write(safetensors("{}", ""));
  EXPECT_TRUE(read_metadata(path_).records.empty());
}

TEST_F(ReadMetadata, FileWithTheMagicAtItsEndIsAFlashpackFileWhateverItBeginsWith) {
  write(kSafetensors + "{}" + trailer(2));
  EXPECT_NE(error_of(path_, Errc::kBadFile).find("Unexpected format: none is given"), std::string::npos);
}

TEST_F(ReadMetadata, SafetensorsHeaderBeginsAfterTheSpacesOfItsWriter) {
  write(safetensors(std::string(4096, ' ') + "{}" + std::string(4096, ' '), ""));
  EXPECT_EQ(read_metadata(path_).format, FileFormat::kSafetensors);
}

TEST_F(ReadMetadata, HeadersOfAnyLengthAroundTheFirstReadAreWhole) {
  const std::string payload(100'000, 'x');
  const std::string json = R"({"w":{"dtype":"U8","shape":[100000],"data_offsets":[0,100000]}})";
  constexpr std::size_t kFirstReadBytes = std::size_t{64} << 10;
  for (std::size_t size = kFirstReadBytes - 12; size < kFirstReadBytes + 3; ++size) {
    write(safetensors(std::string(size - json.size(), ' ') + json, payload));
    EXPECT_EQ(read_metadata(path_).records.at(0).offset_bytes, size + 8) << size;
  }
}

TEST_F(ReadMetadata, TwoReadsOpenASafetensorsFile) {
  write(
      safetensors(R"({"w":{"dtype":"U8","shape":[1000000],"data_offsets":[0,1000000]}})", std::string(1'000'000, 'x')));
  int reads = 0;
  pread_hook = [&](auto... arguments) { return ++reads, system_pread(arguments...); };
  EXPECT_EQ(read_metadata(path_).records.size(), 1U);
  EXPECT_EQ(reads, 2);
}

TEST_F(ReadMetadata, SafetensorsFileThatIsWrittenWhileItIsReadIsAnError) {
  write(kSafetensors);
  pread_hook = [this](auto... arguments) {
    const ssize_t got = system_pread(arguments...);
    std::ofstream(path_, std::ios::app) << 'x';
    return got;
  };
  EXPECT_NE(error_of(path_, Errc::kFileChanged), "accepted");
}

TEST_F(ReadMetadata, RefusesASafetensorsHeaderThatGoesPastTheEnd) {
  for (const std::size_t size : {std::size_t{9}, kSafetensors.size() - 5}) {
    const std::string error = refusal_of(kSafetensors.substr(0, size));
    EXPECT_NE(error.find("goes past the end of the file: it was cut"), std::string::npos) << error;
  }
}

TEST_F(ReadMetadata, RefusesASafetensorsHeaderOverTheLimitBeforeReadingIt) {
  const auto begin = [](std::uint64_t json_bytes) { return trailer(json_bytes).substr(0, 8) + "{"; };
  write(begin(100'000'001) + std::string(1'000'000, ' '));
  std::filesystem::resize_file(path_, 200'000'000);
  EXPECT_NE(error_of(path_, Errc::kBadFile).find("header of 100000001 bytes is over the limit of 100000000"),
            std::string::npos);
  write(begin(1000) + std::string(1000, ' '));
  EXPECT_NE(error_of(path_, Errc::kBadFile, {.max_footer_bytes = 999}).find("over the limit of 999"),
            std::string::npos);
}

TEST_F(ReadMetadata, SaysWhatAnotherFileLooksLike) {
  const std::string no_footer =
      "it has no flashpack footer at its end, and no safetensors header at its beginning; if it had one, ";
  const std::vector<std::pair<std::string, std::string>> kinds = {
      {"\n <!DOCTYPE html><html>404 Not Found</html>", "it is a web page"},
      {R"({"weight_map":{"w":"model.safetensors"}})", "it is JSON text"},
      {std::string(100, '\1'), no_footer + "it was cut"},
      {std::string(50, '\1') + std::string(50, '\0'), no_footer + "its download was not finished"}};
  for (const auto& [bytes, expected] : kinds) {
    const std::string error = refusal_of(bytes);
    EXPECT_NE(error.find("Bad magic: "), std::string::npos) << error;
    EXPECT_NE(error.find(expected), std::string::npos) << error;
  }
}

TEST_F(ReadMetadata, IdentityIsThatOfFstat) {
  write_golden();
  struct stat status{};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  const FileIdentity identity = read_metadata(path_).identity;
  EXPECT_EQ(identity.dev, status.st_dev);
  EXPECT_EQ(identity.ino, status.st_ino);
  EXPECT_EQ(identity.size_bytes, static_cast<std::uint64_t>(status.st_size));
  EXPECT_EQ(identity.mtime_ns, std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec);
}

TEST_F(ReadMetadata, LeavesNoDescriptorOpen) {
  write_golden();
  const int before = ::dup(0);
  ::close(before);
  EXPECT_NO_THROW(read_metadata(path_));
  EXPECT_THROW(read_metadata(directory_), Error);
  EXPECT_NE(refusal_of("not a flashpack file").find("Bad magic"), std::string::npos);
  const int after = ::dup(0);
  ::close(after);
  EXPECT_EQ(after, before);
}

TEST(Codecs, AreInTheOrderOfTheFormatsAndFoundByTheirNames) {
  for (std::size_t i = 0; i < kCodecs.size(); ++i) {
    EXPECT_EQ(kCodecs[i]->format, static_cast<FileFormat>(i));
    EXPECT_EQ(&codec_called(kCodecs[i]->name), kCodecs[i]);
    EXPECT_EQ(format_name(kCodecs[i]->format), kCodecs[i]->name);
  }
  EXPECT_THROW(codec_called("pickle"), Error);
}

TEST_F(ReadMetadata, AnyRangeIsReadWhetherOrNotTheEndsHaveItAlready) {
  constexpr std::uint64_t kEnd = std::uint64_t{64} << 10;
  for (const std::uint64_t size : {kEnd / 2, kEnd + 100, 3 * kEnd}) {
    std::string bytes;
    for (std::uint64_t i = 0; i < size; ++i) bytes += static_cast<char>(i * 2654435761U >> 13);
    write(bytes);
    const internal::UniqueFd fd = internal::open_file(path_);
    OpenedFile file(fd.get(), path_, 0);
    const auto check = [&] {
      const std::array places = {std::uint64_t{0}, std::uint64_t{50}, size - kEnd, size / 2, kEnd, size - 1, size};
      for (const std::uint64_t begin : places) {
        for (const std::uint64_t end : places) {
          if (begin > end || end > size) continue;
          ASSERT_EQ(file.read(begin, end - begin), bytes.substr(begin, end - begin)) << begin << " to " << end;
        }
      }
    };
    check();
    EXPECT_EQ(file.tail(), bytes.substr(size - std::min(size, kEnd)));
    check();
    EXPECT_EQ(file.head(), bytes.substr(0, kEnd));
    check();
  }
}

}  // namespace
}  // namespace flashpack
