#include "engine/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <string>

#include "engine/error.h"
#include "engine/page_size.h"
#include "engine/plan.h"

namespace flashpack::internal {

namespace {

// The most any file system asks for; beyond it buffered reads are the better choice.
constexpr std::uint32_t kMaxBlockBytes = std::uint32_t{1} << 20;

FileIdentity identity_of(const struct stat& status) {
  return {.dev = status.st_dev,
          .ino = status.st_ino,
          .size_bytes = static_cast<std::uint64_t>(status.st_size),
          .mtime_ns = std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec};
}

// fstat, of what an identity needs, but as the file system has it now: fstat may tell what one on a network or FUSE has
// said some time ago, and a change since then would not be seen. False with errno.
bool ask(int fd, struct stat& status, const char* path = "") {
  struct statx now{};
  constexpr unsigned kWanted = STATX_TYPE | STATX_INO | STATX_SIZE | STATX_MTIME;
  if (::statx(fd, path, AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, kWanted, &now) != 0)
    return ::fstatat(fd, path, &status, AT_EMPTY_PATH) == 0;
  status.st_mode = now.stx_mode;
  status.st_dev = ::gnu_dev_makedev(now.stx_dev_major, now.stx_dev_minor);
  status.st_ino = now.stx_ino;
  status.st_size = static_cast<off_t>(now.stx_size);
  status.st_mtim = {.tv_sec = now.stx_mtime.tv_sec, .tv_nsec = now.stx_mtime.tv_nsec};
  return true;
}

// None: the file system says that there is no direct I/O.
std::optional<Alignment> direct_io_alignment(int fd) {
#ifdef STATX_DIOALIGN
  struct statx status{};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN)) {
    if (status.stx_dio_mem_align == 0 || status.stx_dio_offset_align == 0) return std::nullopt;
    const std::uint32_t block_bytes = std::max({status.stx_dio_mem_align, status.stx_dio_offset_align, kPageBytes});
    if (block_bytes > kMaxBlockBytes) return std::nullopt;
    return Alignment{std::bit_ceil(block_bytes), std::bit_ceil(status.stx_dio_mem_align)};
  }
#endif
  return Alignment{};
}

}  // namespace

File File::open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, bool want_direct,
                UniqueFd opened) {
  if (!opened) opened = open_file(path);
  File file(path, std::move(opened));
  struct stat status{};
  if (!ask(file.buffered_fd(), status)) throw file_error(errno_code(errno), "stat", path);
  if (S_ISDIR(status.st_mode)) throw file_error(errno_code(EISDIR), "open", path);
  if (!S_ISREG(status.st_mode)) throw file_error(Errc::kInvalidArgument, "open (not a regular file)", path);
  file.identity_ = identity_of(status);
  if (expected && *expected != file.identity_) throw file_error(Errc::kFileChanged, "open", path);
  if (want_direct) file.open_direct();
  return file;
}

File File::created(std::filesystem::path path, UniqueFd fd) {
  File file(std::move(path), std::move(fd));
  struct stat status{};
  if (ask(file.buffered_fd(), status)) {
    file.identity_ = identity_of(status);
    file.open_direct_for(O_WRONLY);
  } else {
    file.direct_error_ = errno;
  }
  return file;
}

std::optional<FileIdentity> File::identity_at(const std::filesystem::path& path) noexcept {
  struct stat status{};
  if (!ask(AT_FDCWD, status, path.c_str())) return std::nullopt;
  return identity_of(status);
}

void File::open_direct() { open_direct_for(O_RDONLY); }

void File::open_direct_for(int access) {
  wanted_direct_ = true;
  const std::optional<Alignment> alignment = direct_io_alignment(buffered_fd());
  direct_error_ = EOPNOTSUPP;
  if (!alignment) return;
  // Through /proc it is the same inode even when the path has been renamed over in between.
  const std::string self = "/proc/self/fd/" + std::to_string(buffered_fd());
  direct_.reset(::open(self.c_str(), access | O_CLOEXEC | O_DIRECT));
  if (!direct_) direct_.reset(::open(path_.c_str(), access | O_CLOEXEC | O_DIRECT));
  if (!direct_) direct_error_ = errno;
  struct stat status{};
  if (direct_ && (!ask(direct_fd(), status) || identity_of(status) != identity_)) direct_.reset();
  if (!direct_) return;
  alignment_ = *alignment;
  // Whole pages. Of memory, so that none is shared between the kernel's write and anybody else's. Of a file that is
  // written, because what is less than a block goes through the page cache: a page that was partly written so must not
  // be written past it at the same time, or what the cache has of the rest of it overwrites that later.
  alignment_.block_bytes = std::max(alignment_.block_bytes, system_page_bytes());
  if (access != O_RDONLY) return;
  // Misaligned, so that it is refused before anything is read.
  std::byte byte{};
  const iovec vector{&byte, 1};
  may_block_ = ::preadv2(direct_fd(), &vector, 1, 1, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP;
}

void File::drop_from_cache() const noexcept { ::posix_fadvise(buffered_fd(), 0, 0, POSIX_FADV_DONTNEED); }

bool File::unchanged() const noexcept {
  struct stat status{};
  return ask(buffered_fd(), status) && identity_of(status) == identity_;
}

}  // namespace flashpack::internal

// O_NONBLOCK is for a FIFO, to be an error instead of a hang. With it a regular file that somebody has a write lease on
// gives EWOULDBLOCK. The way through O_PATH makes sure that what is waited for is still the regular file.
int flashpack::open_to_read(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd >= 0 || errno != EWOULDBLOCK) return fd;
  const internal::UniqueFd place(::open(path.c_str(), O_PATH | O_CLOEXEC));
  struct stat status{};
  if (!place || ::fstat(place.get(), &status) != 0 || !S_ISREG(status.st_mode)) {
    errno = EWOULDBLOCK;
    return -1;
  }
  const std::string self = "/proc/self/fd/" + std::to_string(place.get());
  return internal::uninterrupted([&] { return ::open(self.c_str(), O_RDONLY | O_CLOEXEC); });
}

std::optional<flashpack::FileIdentity> flashpack::identity_of(int fd) noexcept {
  struct stat status{};
  if (!internal::ask(fd, status)) return std::nullopt;
  return internal::identity_of(status);
}
