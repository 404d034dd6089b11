#include "engine/file_table.h"

#include <fcntl.h>
#include <unistd.h>

namespace flashpack::internal {

std::unique_ptr<OpenFile> FileUse::leave() noexcept {
  OpenFile* const file = std::exchange(file_, nullptr);
  if (!file) return nullptr;
  const bool was_last = file->table_ ? file->table_->leave(*file) : --file->users_ == 0;
  return std::unique_ptr<OpenFile>(was_last ? file : nullptr);
}

bool FileUse::is_shared() const noexcept { return file_->users_ > 1; }

// Returns whether the user was the last.
bool FileTable::leave(OpenFile& file) noexcept {
  const std::lock_guard lock(mutex_);
  if (--file.users_ > 0) return false;
  const auto at = listed_.find(file.file.path());
  if (at != listed_.end() && at->second == &file) listed_.erase(at);  // Otherwise a newer file has taken its place.
  return true;
}

FileUse FileTable::listed(const std::filesystem::path& path, const std::optional<FileIdentity>& expected,
                          bool want_direct) {
  const std::lock_guard lock(mutex_);
  const auto at = listed_.find(path);
  if (at == listed_.end()) return {};
  const File& file = at->second->file;
  const bool fits = (!expected || *expected == file.identity()) && (file.wanted_direct() || !want_direct);
  return fits ? FileUse(at->second) : FileUse();
}

FileUse FileTable::find(const std::filesystem::path& path, const std::optional<FileIdentity>& expected,
                        bool want_direct) {
  FileUse found = listed(path, expected, want_direct);
  // The engine has the file open, but the caller may not be allowed to open it any more.
  const bool readable = found && ::faccessat(AT_FDCWD, path.c_str(), R_OK, AT_EACCESS) == 0;
  return readable && File::identity_at(path) == found->file.identity() ? found : FileUse();
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
  if (served || !own) return FileUse(std::move(file), queue_);
  FileUse opened(std::make_unique<OpenFile>(std::move(file), queue_, 0, this));
  opened->residency.emplace(opened->file.buffered_fd());
  const std::lock_guard lock(mutex_);
  listed_[path] = opened.get();
  return opened;
}

}  // namespace flashpack::internal

namespace flashpack {

using internal::FileUse;

FileHandle::FileHandle(const FileHandle& other) noexcept : FileHandle(FileUse::handle(FileUse::of(other))) {}
FileHandle::~FileHandle() { const FileUse ended = FileUse::of(std::move(*this)); }

const std::filesystem::path& FileHandle::path() const noexcept { return file_->file.path(); }
const FileIdentity& FileHandle::identity() const noexcept { return file_->file.identity(); }
std::uint32_t FileHandle::alignment_bytes() const noexcept { return file_->file.alignment().block_bytes; }
std::error_code FileHandle::check() const noexcept { return file_->file.check_unchanged(); }

}  // namespace flashpack
