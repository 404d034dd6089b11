#include "engine/file_table.h"

#include <fcntl.h>
#include <unistd.h>

namespace flashpack::internal {

FileHandle OpenFile::handle(std::shared_ptr<OpenFile> open) {
  OpenFile* const file = open.get();
  file->add_user();
  const auto last_copy_is_gone = [owner = std::move(open)](OpenFile*) {
    if (owner->remove_user()) owner->close();
  };
  return FileHandle(std::shared_ptr<OpenFile>(file, last_copy_is_gone));
}

void OpenFile::close() noexcept {
  residency.reset();
  file.close();
}

std::shared_ptr<OpenFile> FileTable::find(const std::filesystem::path& path,
                                          const std::optional<FileIdentity>& expected, bool want_direct) {
  std::shared_ptr<OpenFile> found;
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(open_, [](const auto& entry) { return entry.second.expired(); });
    const auto at = open_.find(path);
    if (at != open_.end()) found = at->second.lock();
  }
  if (!found) return nullptr;
  const FileIdentity& identity = found->file.identity();
  const bool fits = (!expected || *expected == identity) && (found->file.wanted_direct() || !want_direct);
  // The engine has the file open, but the caller may not be allowed to open it any more.
  const bool readable = fits && ::faccessat(AT_FDCWD, path.c_str(), R_OK, AT_EACCESS) == 0;
  return readable && File::identity_at(path) == identity ? found : nullptr;
}

std::shared_ptr<OpenFile> FileTable::open(const std::filesystem::path& path,
                                          const std::optional<FileIdentity>& expected, bool want_direct, UniqueFd given,
                                          const std::function<bool(const File&)>& serve) {
  const bool own = !given;
  if (auto shared = own ? find(path, expected, want_direct) : nullptr) {
    if (serve) serve(shared->file);
    return shared;
  }
  File file = File::open(path, expected, false, std::move(given));
  const bool served = serve && serve(file);
  if (want_direct && !served) file.open_direct();
  auto opened = std::make_shared<OpenFile>(std::move(file), queue_);
  if (served || !own) return opened;
  const std::lock_guard lock(mutex_);
  open_[path] = opened;
  return opened;
}

}  // namespace flashpack::internal

const std::filesystem::path& flashpack::FileHandle::path() const noexcept { return open_->file.path(); }
const flashpack::FileIdentity& flashpack::FileHandle::identity() const noexcept { return open_->file.identity(); }
std::uint32_t flashpack::FileHandle::alignment_bytes() const noexcept { return open_->file.alignment().block_bytes; }
bool flashpack::FileHandle::unchanged() const noexcept { return open_->file.unchanged(); }
