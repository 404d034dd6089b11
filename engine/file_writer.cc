#include "flashpack/file_writer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <mutex>
#include <random>
#include <utility>

#include "engine/engine_impl.h"
#include "engine/error.h"

namespace flashpack {

namespace {

using engine::argument_error;
using engine::errno_code;
using engine::file_error;
using engine::UniqueFd;

std::filesystem::path resolve_links(const std::filesystem::path& path) {
  std::error_code error;
  // Absolute, so that there is a directory to sync, whatever the working directory is by then.
  const auto absolute = std::filesystem::absolute(path, error);
  if (error) throw file_error(error, "create", path);
  const auto resolved = std::filesystem::weakly_canonical(absolute, error);
  if (error) throw file_error(error, "create", path);
  return resolved;
}

// The mode of the file to be replaced, or what open(2) would give a new one.
mode_t replaced_mode(const std::filesystem::path& path) {
  constexpr mode_t kNewFileMode = 0666;  // Less the umask.
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) {
    if (errno == ENOENT) return kNewFileMode;
    throw file_error(errno_code(errno), "create", path);
  }
  if (S_ISDIR(status.st_mode)) throw file_error(errno_code(EISDIR), "create", path);
  return status.st_mode & 07777;
}

std::filesystem::path temp_name(const std::filesystem::path& path) {
  std::random_device random;
  std::array<char, 16> suffix{};
  std::generate(suffix.begin(), suffix.end(), [&] { return "0123456789abcdefghijklmnopqrstuv"[random() % 32]; });
  std::string name = ".";
  constexpr std::size_t kMaxKept = 200;  // Of NAME_MAX, with room for the rest.
  name.append(path.filename().string(), 0, kMaxKept).append(".").append(suffix.data(), suffix.size()).append(".tmp");
  return path.parent_path() / name;
}

// Turns a full disk into an error up front; file systems that cannot, say EOPNOTSUPP. Gives an errno.
int reserve(int fd, std::uint64_t size_bytes) {
  while (size_bytes > 0 && ::fallocate(fd, 0, 0, static_cast<off_t>(size_bytes)) != 0) {
    if (errno != EINTR) return errno == EOPNOTSUPP ? 0 : errno;
  }
  return 0;
}

}  // namespace

FileWriter::Impl::Impl(Engine::Impl& engine, const std::filesystem::path& path, const WriterOptions& options)
    : engine_(engine), path_(resolve_links(path)), payload_bytes_(options.payload_bytes) {
  const mode_t mode = replaced_mode(path_);
  temp_path_ = temp_name(path_);
  fd_.reset(::open(temp_path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode));
  if (!fd_) throw file_error(errno_code(errno), "create", path_);
  // umask has cut the mode; a replaced file's mode is kept as it was. Not being allowed to is no reason not to write.
  struct stat status{};
  if (::stat(path_.c_str(), &status) == 0) (void)::fchmod(fd_.get(), mode);
  if (const int error_number = reserve(fd_.get(), options.payload_bytes)) {
    abort();
    throw file_error(errno_code(error_number), "reserve space for", path_);
  }
}

FileWriter::Impl::~Impl() { abort(); }

void FileWriter::Impl::abort() noexcept {
  if (!engine_.is_owner()) return;
  for (const auto& transfer : transfers_) Transfer cancelled_and_waited_for = engine::TransferState::handle(transfer);
  transfers_.clear();
  if (fd_ && !committed_) ::unlink(temp_path_.c_str());
  fd_.reset();
}

Transfer FileWriter::Impl::start_write(std::vector<SourceExtent> extents, Completion* completion, CUstream_st* stream) {
  engine_.require_owner();
  if (!fd_) throw argument_error("write " + path_.string() + ": after commit");
  constexpr std::uint64_t kMaxFileBytes = std::numeric_limits<std::int64_t>::max();
  std::uint64_t end_bytes = payload_bytes_;
  std::array<std::vector<engine::Piece>, 2> pieces;  // From the host, from the device.
  for (const SourceExtent& extent : extents) {
    if (extent.size_bytes == 0) continue;
    if (!extent.source) throw argument_error("write " + path_.string() + ": extent without a source");
    if (extent.size_bytes > kMaxFileBytes || extent.offset_bytes > kMaxFileBytes - extent.size_bytes) {
      throw argument_error("write " + path_.string() + ": extent past 2^63");
    }
    end_bytes = std::max(end_bytes, extent.offset_bytes + extent.size_bytes);
    // The bytes are only read; a piece has one kind of pointer for both directions.
    pieces[engine_.on_device(extent.source)].push_back(
        {extent.offset_bytes, extent.size_bytes, const_cast<std::byte*>(static_cast<const std::byte*>(extent.source))});
  }
  auto state = engine_.new_transfer(completion);
  state->store_fd = fd_.get();
  state->store_path = path_;
  for (const bool on_device : {false, true}) {
    state->plan.add(0, pieces[on_device], engine_.options().chunk_bytes, engine::kPageBytes,
                    {.on_device = on_device, .gaps = !on_device});
  }
  state->router = engine::Router(state->plan, state->sources, CachePolicy::kBuffered);
  engine_.wait_for_stream(*state, stream);
  std::erase_if(transfers_, [](const auto& earlier) {
    const std::lock_guard lock(earlier->mutex);
    return earlier->ended && !earlier->outcome;
  });
  // Before the start: a completion may lead to commit() on another thread before this one is back.
  transfers_.push_back(state);
  const std::uint64_t payload_bytes_before = std::exchange(payload_bytes_, end_bytes);
  try {
    engine_.start(state);
  } catch (...) {
    transfers_.pop_back();
    payload_bytes_ = payload_bytes_before;
    throw;
  }
  return engine::TransferState::handle(std::move(state));
}

// Every transfer has ended well, or this throws. A transfer whose completion is still running has ended: that
// completion may be what led here, by way of another thread.
void FileWriter::Impl::settle() {
  for (const auto& state : transfers_) {
    const std::lock_guard lock(state->mutex);
    if (!state->ended) throw argument_error("commit " + path_.string() + ": a write has not finished");
    if (state->outcome) throw state->outcome->error();
  }
  transfers_.clear();
}

void FileWriter::Impl::write_tail(std::span<const std::byte> tail) {
  const std::uint64_t size_bytes = payload_bytes_ + tail.size();
  for (std::uint64_t done = 0; done < tail.size();) {
    const auto n =
        ::pwrite(fd_.get(), tail.data() + done, tail.size() - done, static_cast<off_t>(payload_bytes_ + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw file_error(errno_code(n < 0 ? errno : EIO), "write", path_);
    done += static_cast<std::uint64_t>(n);
  }
  // Both ways: cuts what was reserved and not used, and makes zeros of what was never written.
  if (::ftruncate(fd_.get(), static_cast<off_t>(size_bytes)) != 0)
    throw file_error(errno_code(errno), "truncate", path_);
}

void FileWriter::Impl::commit(std::span<const std::byte> tail) {
  engine_.require_owner();
  if (!fd_) throw argument_error("commit " + path_.string() + ": committed or aborted before");
  try {
    settle();
    write_tail(tail);
    if (::fdatasync(fd_.get()) != 0) throw file_error(errno_code(errno), "sync", path_);
    if (::rename(temp_path_.c_str(), path_.c_str()) != 0)
      throw file_error(errno_code(errno), "rename into place", path_);
  } catch (...) {
    abort();
    throw;
  }
  committed_ = true;
  fd_.reset();
  const auto directory_path = path_.has_parent_path() ? path_.parent_path() : ".";
  const UniqueFd directory(::open(directory_path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory || ::fsync(directory.get()) != 0) {
    throw file_error(errno_code(errno), "sync the directory of (the new file is in place, but perhaps not durable)",
                     path_);
  }
}

FileWriter::FileWriter(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
FileWriter::FileWriter(FileWriter&&) noexcept = default;
FileWriter& FileWriter::operator=(FileWriter&&) noexcept = default;
FileWriter::~FileWriter() = default;

Transfer FileWriter::start_write(std::vector<SourceExtent> extents, Completion* completion, CUstream_st* stream) {
  return impl_->start_write(std::move(extents), completion, stream);
}

TransferStats FileWriter::write(std::vector<SourceExtent> extents, CUstream_st* stream) {
  return start_write(std::move(extents), nullptr, stream).wait();
}

void FileWriter::commit(std::span<const std::byte> tail) { impl_->commit(tail); }

}  // namespace flashpack
