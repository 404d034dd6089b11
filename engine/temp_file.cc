#include "engine/temp_file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "engine/ground/error.h"
#include "engine/ground/file_kind.h"
#include "engine/ground/system_call.h"

namespace flashpack::internal {

namespace {

constexpr std::string_view kAlphabet = "0123456789abcdefghijklmnopqrstuv";
constexpr std::size_t kRandomSize = 16;  // 80 bits: no two writers choose the same name.
constexpr std::string_view kSuffix = ".tmp";

// Makes a part of a name for a file beside `target`.
std::string random_text(const std::filesystem::path& target) {
  std::string text(kRandomSize, '\0');
  if (::getentropy(text.data(), text.size()) != 0)
    throw file_error(errno_code(errno), "get random bytes to name a file beside", target);
  std::transform(text.begin(), text.end(), text.begin(),
                 [](char byte) { return kAlphabet[static_cast<unsigned char>(byte) % kAlphabet.size()]; });
  return text;
}

// Returns 0 or an errno: EWOULDBLOCK if somebody else holds the lock.
int lock(int fd) noexcept {
  return uninterrupted([fd] { return ::flock(fd, LOCK_EX | LOCK_NB); }) == 0 ? 0 : errno;
}

// A link in /proc leads to an open file, even if that file has another name than the link's text says, or none.
bool misnames(const std::filesystem::path& link, const std::filesystem::path& text) {
  struct statfs file_system{};
  struct stat file{};
  struct stat named{};
  if (::statfs(link.parent_path().c_str(), &file_system) != 0 || file_system.f_type != PROC_SUPER_MAGIC) return false;
  if (::stat(link.c_str(), &file) != 0) return false;
  return ::stat(text.c_str(), &named) != 0 || named.st_dev != file.st_dev || named.st_ino != file.st_ino;
}

}  // namespace

std::filesystem::path absolute_path(const std::filesystem::path& path) {
  std::error_code error;
  auto absolute = std::filesystem::absolute(path, error);
  if (error) throw file_error(error, "create", path);
  return absolute;
}

std::filesystem::path resolve_links(const std::filesystem::path& path) {
  std::error_code error;
  auto resolved = absolute_path(path);
  constexpr int kMaxLinks = 40;  // The kernel's own limit.
  for (int links = 0; links <= kMaxLinks; ++links) {
    const auto next = std::filesystem::read_symlink(resolved, error);
    // The path is no link, or nothing is there. Other errors appear when the path is used.
    if (error) return resolved;
    // read_symlink() does not check whether the kernel would follow the link (fs.protected_symlinks).
    struct stat status{};
    if (::stat(resolved.c_str(), &status) != 0 && errno == EACCES) throw file_error(errno_code(EACCES), "create", path);
    auto text = resolved.parent_path() / next;
    if (misnames(resolved, text)) {
      throw file_error(Errc::kInvalidArgument, "create (an open file has no name that another one could take)", path);
    }
    resolved = std::move(text);
  }
  throw file_error(errno_code(ELOOP), "create", path);
}

TempFile::TempFile(std::filesystem::path target, Links links) : target_(std::move(target)), links_(links) {
  if (!target_.has_filename()) throw file_error(errno_code(EISDIR), "create", target_);
  directory_.reset(::open(target_.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory_) throw file_error(errno_code(errno), "create", target_);
  look_at_target();
  const std::string name = target_.filename().string();
  std::size_t kept = std::min<std::size_t>(name.size(), 200);  // NAME_MAX is 255, and the rest needs room.
  // Characters stay whole, because some file systems take nothing but UTF-8.
  while (kept > 0 && kept < name.size() && (name[kept] & 0xC0) == 0x80) --kept;
  prefix_.append(".").append(name, 0, kept).append(".");
}

TempFile::~TempFile() {
  if (owner_.is_current()) remove();
}

void TempFile::look_at_target() {
  struct stat status{};
  const int flags = links_ == Links::kAreReplaced ? 0 : AT_SYMLINK_NOFOLLOW;
  if (::fstatat(directory_.get(), target_.filename().c_str(), &status, flags) == 0) {
    if (S_ISDIR(status.st_mode)) throw file_error(errno_code(EISDIR), "create", target_);
    if (!S_ISREG(status.st_mode))
      throw file_error(Errc::kInvalidArgument, refusal_of("create", status.st_mode).c_str(), target_);
    replaced_ = status;
  } else if (errno != ENOENT) {
    throw file_error(errno_code(errno), "create", target_);
  }
}

bool TempFile::is_name_of_one(std::string_view name) const {
  return name.size() == prefix_.size() + kRandomSize + kSuffix.size() && name.starts_with(prefix_) &&
         name.ends_with(kSuffix) &&
         name.substr(prefix_.size(), kRandomSize).find_first_not_of(kAlphabet) == std::string_view::npos;
}

void TempFile::remove_if_left(const char* name) const noexcept {
  constexpr int kFlags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  // NFS locks only files that are open for writing. Other file systems also lock a file that may not be written to.
  UniqueFd fd(::openat(directory_.get(), name, O_RDWR | kFlags));
  if (!fd) fd.reset(::openat(directory_.get(), name, O_RDONLY | kFlags));
  struct stat status{};
  if (!fd || ::fstat(fd.get(), &status) != 0 || !S_ISREG(status.st_mode)) return;
  // If its writer has put it in place in the meantime, nothing has this name any longer, and this does nothing.
  if (lock(fd.get()) == 0) ::unlinkat(directory_.get(), name, 0);
}

UniqueFd TempFile::create() {
  std::error_code error;
  std::filesystem::directory_iterator entry(target_.parent_path(), error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (is_name_of_one(name)) remove_if_left(name.c_str());
  }
  // The file that is replaced may be readable by few. Until keep_access() has set the same group and mode, only the
  // owner may open this one.
  const mode_t mode = replaced_ ? 0600 : 0666;
  constexpr int kMaxAttempts = 100;  // A bound, and not tuned: one name that is taken is unlikely already.
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    name_ = prefix_ + random_text(target_) + std::string(kSuffix);
    UniqueFd fd(::openat(directory_.get(), name_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode));
    if (!fd) {
      const int reason = errno;
      name_.clear();
      throw file_error(errno_code(reason), "create", target_);
    }
    // Until it is locked it looks like a file that was left behind, so that another writer may have removed it.
    struct stat status{};
    const bool taken = lock(fd.get()) == EWOULDBLOCK;
    if (!taken && (::fstatat(directory_.get(), name_.c_str(), &status, 0) == 0 || errno != ENOENT)) return fd;
    remove();
  }
  throw file_error(errno_code(EBUSY), "create", target_);
}

void TempFile::keep_access(int fd) {
  look_at_target();  // The file that is replaced may have changed since.
  struct stat status{};
  if (!replaced_) return;
  if (::fstat(fd, &status) != 0) throw file_error(errno_code(errno), "stat", target_);
  mode_t mode = replaced_->st_mode & 0777;
  // If the file cannot get the old group, its own group gets only the permissions that all other users have.
  if (status.st_gid != replaced_->st_gid && ::fchown(fd, static_cast<uid_t>(-1), replaced_->st_gid) != 0)
    mode = (mode & 0707) | ((mode & 0007) << 3);
  // A file system without modes shows the same one for all files, and is not asked to change it.
  if ((status.st_mode & 07777) != mode && ::fchmod(fd, mode) != 0)
    throw file_error(errno_code(errno), "keep the mode of", target_);
  if (status.st_uid != replaced_->st_uid) (void)::fchown(fd, replaced_->st_uid, static_cast<gid_t>(-1));
}

void TempFile::put_in_place() {
  if (::renameat(directory_.get(), name_.c_str(), directory_.get(), target_.filename().c_str()) != 0)
    throw file_error(errno_code(errno), "rename into place", target_);
  name_.clear();
}

void TempFile::commit(int fd) {
  keep_access(fd);
  if (uninterrupted([fd] { return ::fdatasync(fd); }) != 0) throw file_error(errno_code(errno), "sync", target_);
  put_in_place();
}

void TempFile::sync_directory() const {
  // EINVAL means that this file system cannot sync directories.
  if (uninterrupted([this] { return ::fsync(directory_.get()); }) == 0 || errno == EINVAL) return;
  throw file_error(errno_code(errno), "sync the directory of (the new file is in place, but perhaps not durable)",
                   target_);
}

void TempFile::remove() noexcept {
  if (!name_.empty()) ::unlinkat(directory_.get(), name_.c_str(), 0);
  name_.clear();
}

void replace_file(const std::filesystem::path& path, std::string_view bytes) {
  const std::filesystem::path target = resolve_links(path);
  TempFile temp(target);
  const UniqueFd fd = temp.create();
  while (!bytes.empty()) {
    const ssize_t n = uninterrupted([&] { return ::write(fd.get(), bytes.data(), bytes.size()); });
    if (n <= 0) throw file_error(errno_code(n < 0 ? errno : EIO), "write", target);
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
  temp.commit(fd.get());
  temp.sync_directory();
}

}  // namespace flashpack::internal
