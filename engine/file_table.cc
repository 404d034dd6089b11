#include "engine/file_table.h"

#include <fcntl.h>
#include <unistd.h>

namespace flashpack::internal {

FileUse FileUse::join(const std::weak_ptr<OpenFile>& remembered) noexcept {
  std::shared_ptr<OpenFile> file = remembered.lock();
  if (!file) return {};
  std::uint32_t users = file->users_;
  while (users > 0 && !file->users_.compare_exchange_weak(users, users + 1)) continue;
  return users > 0 ? FileUse(std::move(file)) : FileUse();
}

std::shared_ptr<OpenFile> FileUse::leave() noexcept {
  std::shared_ptr<OpenFile> file = std::exchange(file_, nullptr);
  return file && --file->users_ == 0 ? file : nullptr;
}

void OpenFile::close() noexcept {
  residency.reset();
  file.close();
}

FileUse FileTable::find(const std::filesystem::path& path, const std::optional<FileIdentity>& expected,
                        bool want_direct) {
  FileUse found;
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(open_, [](const auto& entry) { return entry.second.expired(); });
    const auto at = open_.find(path);
    if (at != open_.end()) found = FileUse::join(at->second);
  }
  if (!found) return {};
  const FileIdentity& identity = found->file.identity();
  const bool fits = (!expected || *expected == identity) && (found->file.wanted_direct() || !want_direct);
  // The engine has the file open, but the caller may not be allowed to open it any more.
  const bool readable = fits && ::faccessat(AT_FDCWD, path.c_str(), R_OK, AT_EACCESS) == 0;
  return readable && File::identity_at(path) == identity ? found : FileUse();
}

FileUse FileTable::open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected,
                        bool want_direct, UniqueFd given, const std::function<bool(const File&)>& serve) {
  const bool own = !given;
  if (FileUse shared = own ? find(path, expected, want_direct) : FileUse()) {
    if (serve) serve(shared->file);
    return shared;
  }
  File file = File::open(path, expected, false, std::move(given));
  const bool served = serve && serve(file);
  if (want_direct && !served) file.open_direct();
  FileUse opened(std::move(file), queue_);
  if (served || !own) return opened;
  const std::lock_guard lock(mutex_);
  open_[path] = opened.remember();
  return opened;
}

}  // namespace flashpack::internal

const std::filesystem::path& flashpack::FileHandle::path() const noexcept { return (*use_)->file.path(); }
const flashpack::FileIdentity& flashpack::FileHandle::identity() const noexcept { return (*use_)->file.identity(); }
std::uint32_t flashpack::FileHandle::alignment_bytes() const noexcept { return (*use_)->file.alignment().block_bytes; }
std::error_code flashpack::FileHandle::check() const noexcept { return (*use_)->file.check_unchanged(); }
