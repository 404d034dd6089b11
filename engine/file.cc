#include "engine/file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#if __has_include(<linux/openat2.h>)
#include <linux/openat2.h>
#endif
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <string>

#include "engine/ground/error.h"
#include "engine/ground/file_kind.h"
#include "engine/ground/pages.h"
#include "engine/ground/system_call.h"
#include "engine/plan.h"

namespace flashpack::internal {

namespace {

// A path of the inode that is open as `fd`, wherever that is by now, or if it has no name.
std::string path_of(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

// No file system is known to demand more.
constexpr std::uint32_t kMaxBlockBytes = std::uint32_t{1} << 20;

struct Status {
  mode_t mode = 0;
  FileIdentity identity;
};

// Fills in the identity of the block device that is open as `fd`. Its node has no size, and its mtime does not show
// writes to the device. Returns false with errno set.
bool ask_device(int fd, FileIdentity& identity) {
  std::uint64_t size_bytes = 0;
  if (::ioctl(fd, BLKGETSIZE64, &size_bytes) != 0) return false;
  identity.size_bytes = size_bytes;
  identity.mtime_ns = 0;
  identity.ino = 0;
#ifdef BLKGETDISKSEQ
  std::uint64_t sequence = 0;
  if (::ioctl(fd, BLKGETDISKSEQ, &sequence) == 0) identity.ino = sequence;
#endif
  return true;
}

// Times too far away for 64 bits wrap around, so that different ones still look different.
std::int64_t nanoseconds(std::int64_t seconds, std::uint64_t rest) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(seconds) * 1'000'000'000 + rest);
}

// Whether the file system is one of those whose inodes in memory tell all that a file's identity has, and who may read
// it. Others may ask a server, even those that can refuse to wait for a read.
bool is_of_memory_or_disk(int fd) {
  constexpr long kXfsMagic = 0x58465342;  // XFS_SB_MAGIC of xfsprogs; linux/magic.h has it from Linux 6.11 on.
  struct statfs file_system{};
  if (::fstatfs(fd, &file_system) != 0) return false;
  const std::array<long, 5> known{EXT4_SUPER_MAGIC, kXfsMagic, BTRFS_SUPER_MAGIC, F2FS_SUPER_MAGIC, TMPFS_MAGIC};
  return std::ranges::find(known, file_system.f_type) != known.end();
}

FileIdentity identity_in(const struct statx& status) {
  return {.dev = ::gnu_dev_makedev(status.stx_dev_major, status.stx_dev_minor),
          .ino = status.stx_ino,
          .size_bytes = status.stx_size,
          .mtime_ns = nanoseconds(status.stx_mtime.tv_sec, status.stx_mtime.tv_nsec)};
}

constexpr unsigned kWanted = STATX_TYPE | STATX_INO | STATX_SIZE | STATX_MTIME;

// Gets the fields of an identity as the file system has them now. fstat may return old values for FUSE or a network,
// and would hide a change. Empty with errno set if that fails.
std::optional<Status> ask(int fd, const char* path = "") {
  struct statx now{};
  Status found;
  FileIdentity& identity = found.identity;
  dev_t device = 0;
  const bool answered = ::statx(fd, path, AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, kWanted, &now) == 0;
  // Any other error is the file system's, and old values would hide it. glibc turns ENOSYS into EINVAL, because it
  // cannot make up for AT_STATX_FORCE_SYNC.
  const bool sandbox_refuses = !answered && (errno == ENOSYS || errno == EINVAL || errno == EPERM);
  if (!answered && !sandbox_refuses) return std::nullopt;
  if (answered) {
    found.mode = now.stx_mode;
    device = ::gnu_dev_makedev(now.stx_rdev_major, now.stx_rdev_minor);
    identity = identity_in(now);
  } else {
    struct stat status{};
    if (::fstatat(fd, path, &status, AT_EMPTY_PATH) != 0) return std::nullopt;
    found.mode = status.st_mode;
    device = status.st_rdev;
    identity = {.dev = status.st_dev,
                .ino = status.st_ino,
                .size_bytes = static_cast<std::uint64_t>(status.st_size),
                .mtime_ns = nanoseconds(status.st_mtim.tv_sec, static_cast<std::uint64_t>(status.st_mtim.tv_nsec))};
  }
  if (!S_ISBLK(found.mode)) return found;
  identity.dev = device;
  const UniqueFd own(*path != '\0' ? open_to_read(path) : -1);
  if (*path != '\0' && !own) return std::nullopt;
  if (!ask_device(own ? own.get() : fd, identity)) return std::nullopt;
  return found;
}

// Empty if the file system says that it has no direct I/O.
std::optional<Alignment> direct_io_alignment(int fd, bool device) {
#ifdef STATX_DIOALIGN
  struct statx status{};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN)) {
    if (status.stx_dio_mem_align == 0 || status.stx_dio_offset_align == 0) return std::nullopt;
    const std::uint32_t block_bytes = std::max({status.stx_dio_mem_align, status.stx_dio_offset_align, kPageBytes});
    if (block_bytes > kMaxBlockBytes) return std::nullopt;
    return Alignment{std::bit_ceil(block_bytes), std::bit_ceil(status.stx_dio_mem_align)};
  }
#endif
  // Before Linux 6.1 a device tells only the size of its sectors.
  int sector_bytes = 0;
  if (device && ::ioctl(fd, BLKSSZGET, &sector_bytes) == 0 && sector_bytes > 0) {
    const auto block_bytes = std::bit_ceil(std::max(static_cast<std::uint32_t>(sector_bytes), kPageBytes));
    return Alignment{block_bytes, block_bytes};
  }
  return Alignment{};
}

// A descriptor that reads through the page cache in place of `given`, which the caller may have opened for direct I/O.
// Throws: Error.
UniqueFd buffered(UniqueFd given, const std::filesystem::path& path) {
  const int flags = ::fcntl(given.get(), F_GETFL);
  const bool unreadable = flags >= 0 && ((flags & O_PATH) != 0 || (flags & O_ACCMODE) == O_WRONLY);
  if (unreadable) throw file_error(errno_code(EBADF), "read (from a descriptor that is not open for reading)", path);
  if (flags < 0 || (flags & O_DIRECT) == 0) return given;
  UniqueFd again(::open(path_of(given.get()).c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!again) throw file_error(errno_code(errno), "open again without O_DIRECT", path);
  return again;
}

}  // namespace

File File::open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, bool want_direct,
                UniqueFd opened) {
  const bool by_descriptor = static_cast<bool>(opened);
  File file(path, opened ? buffered(std::move(opened), path) : open_file(path));
  file.by_descriptor_ = by_descriptor;
  const std::optional<Status> status = ask(file.buffered_fd());
  if (!status) throw file_error(errno_code(errno), "stat", path);
  if (S_ISDIR(status->mode)) throw file_error(errno_code(EISDIR), "open", path);
  file.is_device_ = S_ISBLK(status->mode);
  file.answers_at_once_ = S_ISREG(status->mode) && is_of_memory_or_disk(file.buffered_fd());
  if (!S_ISREG(status->mode) && !file.is_device_)
    throw file_error(Errc::kInvalidArgument, refusal_of("open", status->mode).c_str(), path);
  file.identity_ = status->identity;
  if (expected && *expected != file.identity_) throw file_error(Errc::kFileChanged, "open", path);
  if (want_direct) file.open_direct();
  return file;
}

File File::created(std::filesystem::path path, UniqueFd fd) {
  File file(std::move(path), std::move(fd));
  if (const std::optional<Status> status = ask(file.buffered_fd())) {
    file.identity_ = status->identity;
    file.open_direct_for(O_WRONLY);
  } else {
    file.direct_error_ = errno_code(errno);
  }
  return file;
}

std::optional<FileIdentity> File::identity_at(const std::filesystem::path& path) noexcept {
  const std::optional<Status> status = ask(AT_FDCWD, path.c_str());
  return status ? std::optional(status->identity) : std::nullopt;
}

bool File::is_known_to_be_at([[maybe_unused]] const std::filesystem::path& path) const noexcept {
#if defined(RESOLVE_CACHED) && defined(SYS_faccessat2)
  if (!answers_at_once()) return false;
  open_how how{};
  how.flags = O_PATH | O_CLOEXEC;
  how.resolve = RESOLVE_CACHED;
  const UniqueFd found(static_cast<int>(::syscall(SYS_openat2, AT_FDCWD, path.c_str(), &how, sizeof how)));
  if (!found) return false;
  // The system call is made directly, because where a sandbox refuses it, glibc's statx() calls fstatat(2), which may
  // wait. The file system may be asked for more only when it is known to be this file's.
  struct statx status{};
  return ::syscall(SYS_statx, found.get(), "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, kWanted, &status) == 0 &&
         identity_in(status) == identity_ &&
         ::syscall(SYS_faccessat2, found.get(), "", R_OK, AT_EMPTY_PATH | AT_EACCESS) == 0;
#else
  return false;
#endif
}

void File::open_direct() { open_direct_for(O_RDONLY); }

// Sets direct_, or gives the reason why it cannot.
std::error_code File::open_same(int access) {
  // /proc leads to the same inode even if another file is at the path by now.
  const std::string self = path_of(buffered_fd());
  UniqueFd fd(::open(self.c_str(), access | O_CLOEXEC | O_DIRECT));
  if (!fd && !by_descriptor_) fd.reset(::open(path_.c_str(), access | O_CLOEXEC | O_DIRECT | O_NONBLOCK | O_NOCTTY));
  if (!fd) return errno_code(errno);
  const std::optional<Status> status = ask(fd.get());
  if (!status) return errno_code(errno);
  if (status->identity != identity_) return Errc::kFileChanged;
  direct_ = std::move(fd);
  return {};
}

void File::open_direct_for(int access) {
  wanted_direct_ = true;
  const std::optional<Alignment> alignment = direct_io_alignment(buffered_fd(), is_device_);
  direct_error_ = alignment ? open_same(access) : errno_code(EOPNOTSUPP);
  if (direct_error_) return;
  alignment_ = *alignment;
  // Disk blocks are whole pages. In memory, the kernel then never writes to a page that others use. In a file that is
  // written, less than a disk block goes through the page cache; if a direct write shared a page with it, the page
  // cache would later overwrite the direct write with old bytes.
  alignment_.block_bytes = std::max(alignment_.block_bytes, system_page_bytes());
  if (access != O_RDONLY) return;
  // The address is misaligned, so that the kernel reads nothing: it answers EINVAL if it can refuse to wait, else
  // EOPNOTSUPP.
  std::byte byte{};
  const iovec vector{&byte, 1};
  may_block_ = ::preadv2(direct_fd(), &vector, 1, 1, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP;
}

UniqueFd duplicate(int fd, const std::filesystem::path& path) {
  UniqueFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!copy) throw file_error(errno_code(errno), "duplicate descriptor", path);
  return copy;
}

void File::drop_from_cache() const noexcept { ::posix_fadvise(buffered_fd(), 0, 0, POSIX_FADV_DONTNEED); }

std::error_code File::check_unchanged() const noexcept {
  const std::optional<Status> status = ask(buffered_fd());
  if (!status) return errno_code(errno);
  return status->identity == identity_ ? std::error_code() : Errc::kFileChanged;
}

}  // namespace flashpack::internal

// O_NONBLOCK keeps the open of a FIFO from waiting for a writer. With it, a regular file under a write lease gives
// EWOULDBLOCK and is opened again, without it. That open goes through an O_PATH descriptor, so that it is still the
// same regular file.
int flashpack::open_to_read(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd >= 0 || errno != EWOULDBLOCK) return fd;
  const internal::UniqueFd found(::open(path.c_str(), O_PATH | O_CLOEXEC));
  struct stat status{};
  if (!found || ::fstat(found.get(), &status) != 0 || !S_ISREG(status.st_mode)) {
    errno = EWOULDBLOCK;
    return -1;
  }
  const std::string self = internal::path_of(found.get());
  return internal::uninterrupted([&] { return ::open(self.c_str(), O_RDONLY | O_CLOEXEC); });
}

std::optional<flashpack::FileIdentity> flashpack::identity_of(int fd) noexcept {
  const auto status = internal::ask(fd);
  return status ? std::optional(status->identity) : std::nullopt;
}
