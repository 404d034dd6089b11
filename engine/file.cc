#include "engine/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <string>

#include "engine/ground/error.h"
#include "engine/ground/pages.h"
#include "engine/plan.h"

namespace flashpack::internal {

namespace {

// No file system is known to demand more; with larger blocks, buffered reads are better.
constexpr std::uint32_t kMaxBlockBytes = std::uint32_t{1} << 20;

FileIdentity identity_of(const struct stat& status) {
  return {.dev = status.st_dev,
          .ino = status.st_ino,
          .size_bytes = static_cast<std::uint64_t>(status.st_size),
          .mtime_ns = std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec};
}

// Gets the fields of an identity as the file system has them now. fstat may return old values for FUSE or a network,
// and would hide a change. Returns false with errno set.
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

// Empty if the file system says that it has no direct I/O.
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
  // /proc leads to the same inode even if another file is at the path by now.
  const std::string self = "/proc/self/fd/" + std::to_string(buffered_fd());
  direct_.reset(::open(self.c_str(), access | O_CLOEXEC | O_DIRECT));
  if (!direct_) direct_.reset(::open(path_.c_str(), access | O_CLOEXEC | O_DIRECT));
  if (!direct_) direct_error_ = errno;
  struct stat status{};
  if (direct_ && (!ask(direct_fd(), status) || identity_of(status) != identity_)) direct_.reset();
  if (!direct_) return;
  alignment_ = *alignment;
  // Blocks are whole pages. In memory, the kernel then never writes to a page that others use. In a file that is
  // written, less than a block goes through the page cache; if a direct write shared a page with it, the page cache
  // would later overwrite the direct write with old bytes.
  alignment_.block_bytes = std::max(alignment_.block_bytes, system_page_bytes());
  if (access != O_RDONLY) return;
  // The address is misaligned, so that the kernel refuses before it reads.
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

// O_NONBLOCK keeps the open of a FIFO from waiting for a writer. With it, a regular file under a write lease gives
// EWOULDBLOCK and is opened again, without it. That open goes through an O_PATH descriptor, so that it is still the
// same regular file.
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
