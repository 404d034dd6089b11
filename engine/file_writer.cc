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

}  // namespace

FileWriter::Impl::Impl(Engine::Impl& engine, const std::filesystem::path& path, const WriterOptions& options)
    : engine_(engine),
      path_(resolve_links(path)),
      payload_bytes_(options.payload_bytes),
      want_checksums_(options.checksums) {
  const mode_t mode = replaced_mode(path_);
  temp_path_ = temp_name(path_);
  UniqueFd fd(::open(temp_path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode));
  if (!fd) throw file_error(errno_code(errno), "create", path_);
  try {
    file_.emplace(engine::File::created(temp_path_, std::move(fd)));
    // umask has cut the mode; a replaced file's mode is kept as it was. Not being allowed to is no reason not to write.
    struct stat status{};
    if (::stat(path_.c_str(), &status) == 0) (void)::fchmod(file_->buffered_fd(), mode);
    reserve(0, payload_bytes_);
  } catch (...) {
    abort();
    throw;
  }
}

FileWriter::Impl::~Impl() { abort(); }

void FileWriter::Impl::abort() noexcept {
  if (!engine_.is_owner()) return;
  for (const auto& transfer : transfers_) Transfer cancelled_and_waited_for = engine::TransferState::handle(transfer);
  transfers_.clear();
  if (!committed_) ::unlink(temp_path_.c_str());
  file_.reset();
}

// Turns a full disk into an error up front, and keeps writes from growing the file, which the kernel does one at a
// time. File systems that cannot, say EOPNOTSUPP.
void FileWriter::Impl::reserve(std::uint64_t begin_bytes, std::uint64_t end_bytes) {
  begin_bytes = std::max(begin_bytes, reserved_bytes_);
  while (end_bytes > begin_bytes) {
    const auto begin = static_cast<off_t>(begin_bytes);
    const auto size = static_cast<off_t>(end_bytes - begin_bytes);
    if (::fallocate(file_->buffered_fd(), 0, begin, size) == 0 || errno == EOPNOTSUPP || errno == ENOSYS) break;
    if (errno != EINTR) throw file_error(errno_code(errno), "reserve space for", path_);
  }
  reserved_bytes_ = std::max(reserved_bytes_, end_bytes);
}

// What `claimed`, begin and end of what is written, becomes with `pieces`, in ascending order, and with the zeros
// between those that are less than a block apart. Throws where something is claimed twice.
FileWriter::Impl::Claims FileWriter::Impl::claims_with(std::span<const engine::Piece> pieces) const {
  Claims claims = claimed_;
  const std::uint32_t block_bytes = file_->alignment().block_bytes;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const std::uint64_t begin = pieces[i].offset_bytes;
    std::uint64_t end = begin + pieces[i].size_bytes;
    const std::uint64_t next = i + 1 < pieces.size() ? pieces[i + 1].offset_bytes : end;
    if (next > end && next - end < block_bytes) end = next;
    const auto after = claims.lower_bound(begin);
    const auto before = after == claims.begin() ? claims.end() : std::prev(after);
    if ((after != claims.end() && after->first < end) || (before != claims.end() && before->second > begin)) {
      throw argument_error("write " + path_.string() + ": the bytes at " + std::to_string(begin) + " twice");
    }
    if (before != claims.end() && before->second == begin) {
      before->second = end;
    } else {
      claims.emplace_hint(after, begin, end);
    }
  }
  return claims;
}

// In ascending order.
std::vector<engine::Piece> FileWriter::Impl::pieces_of(std::span<const SourceExtent> extents) const {
  constexpr std::uint64_t kMaxFileBytes = std::numeric_limits<std::int64_t>::max();
  std::vector<engine::Piece> pieces;
  pieces.reserve(extents.size());
  for (const SourceExtent& extent : extents) {
    if (extent.size_bytes == 0) continue;
    if (!extent.source) throw argument_error("write " + path_.string() + ": extent without a source");
    if (extent.size_bytes > kMaxFileBytes || extent.offset_bytes > kMaxFileBytes - extent.size_bytes) {
      throw argument_error("write " + path_.string() + ": extent past 2^63");
    }
    // The bytes are only read; a piece has one kind of pointer for both directions.
    pieces.push_back(
        {extent.offset_bytes, extent.size_bytes, const_cast<std::byte*>(static_cast<const std::byte*>(extent.source))});
  }
  std::sort(pieces.begin(), pieces.end(), [](const auto& a, const auto& b) { return a.offset_bytes < b.offset_bytes; });
  return pieces;
}

std::shared_ptr<engine::TransferState> FileWriter::Impl::plan(std::span<const engine::Piece> pieces,
                                                              Completion* completion) const {
  auto state = engine_.new_transfer(completion);
  state->store = &*file_;
  state->store_path = path_;
  state->store_direct = file_->direct_fd() >= 0;
  if (!state->store_direct) state->note_fallback("direct I/O: " + errno_code(file_->direct_error()).message());
  if (want_checksums_ && !pieces.empty()) {
    state->store_sums.emplace(pieces.front().offset_bytes, pieces.back().offset_bytes + pieces.back().size_bytes);
  }
  std::array<std::vector<engine::Piece>, 2> sides;  // On the host, on the device.
  for (const engine::Piece& piece : pieces) sides[engine_.on_device(piece.memory)].push_back(piece);
  // What lies between two extents of one side may be of the other.
  const bool fill_gaps = sides[0].empty() || sides[1].empty();
  engine::Alignment alignment = file_->alignment();
  alignment.block_bytes = std::min(alignment.block_bytes, engine_.options().chunk_bytes);
  for (const bool on_device : {false, true}) {
    state->plan.add_store(sides[on_device], engine_.options().chunk_bytes, alignment, fill_gaps, on_device);
  }
  state->router = engine::Router(state->plan, state->store_direct ? alignment.block_bytes : 0);
  return state;
}

Transfer FileWriter::Impl::start_write(std::span<const SourceExtent> extents, Completion* completion,
                                       CUstream_st* stream) {
  engine_.require_owner();
  if (!file_) throw argument_error("write " + path_.string() + ": after commit");
  const std::vector<engine::Piece> pieces = pieces_of(extents);
  Claims claims = claims_with(pieces);
  auto state = plan(pieces, completion);
  engine_.wait_for_stream(*state, stream);
  std::uint64_t payload_bytes = payload_bytes_;
  if (!pieces.empty()) {
    payload_bytes = std::max(payload_bytes, pieces.back().offset_bytes + pieces.back().size_bytes);
    reserve(pieces.front().offset_bytes, payload_bytes);
  }
  std::erase_if(transfers_, [this](const auto& earlier) {
    const std::lock_guard lock(earlier->mutex);
    if (!earlier->ended || earlier->outcome) return false;
    if (earlier->store_sums) sums_.add(*earlier->store_sums);
    return true;
  });
  // Before the start: a completion may lead to commit() on another thread before this one is back.
  transfers_.push_back(state);
  claims.swap(claimed_);
  std::swap(payload_bytes, payload_bytes_);
  try {
    engine_.start(state);
  } catch (...) {
    transfers_.pop_back();
    claims.swap(claimed_);
    std::swap(payload_bytes, payload_bytes_);
    throw;
  }
  return engine::TransferState::handle(std::move(state));
}

// Every transfer has ended well, or this throws. A transfer whose completion is still running has ended: that
// completion may be what led here, by way of another thread.
void FileWriter::Impl::settle(const char* verb) {
  for (const auto& state : transfers_) {
    const std::lock_guard lock(state->mutex);
    if (!state->ended) throw argument_error(verb + (" " + path_.string()) + ": a write has not finished");
    if (state->outcome) throw state->outcome->error();
  }
  for (const auto& state : transfers_) {
    if (state->store_sums) sums_.add(*state->store_sums);
  }
  transfers_.clear();
}

void FileWriter::Impl::write_tail(std::span<const std::byte> tail) {
  const std::uint64_t size_bytes = payload_bytes_ + tail.size();
  for (std::uint64_t done = 0; done < tail.size();) {
    const auto n = ::pwrite(file_->buffered_fd(), tail.data() + done, tail.size() - done,
                            static_cast<off_t>(payload_bytes_ + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw file_error(errno_code(n < 0 ? errno : EIO), "write", path_);
    done += static_cast<std::uint64_t>(n);
  }
  // Both ways: cuts what was reserved and not used, and makes zeros of what was never written.
  if (::ftruncate(file_->buffered_fd(), static_cast<off_t>(size_bytes)) != 0)
    throw file_error(errno_code(errno), "truncate", path_);
}

Checksums FileWriter::Impl::checksums() {
  engine_.require_owner();
  if (!file_) throw argument_error("checksums of " + path_.string() + ": after commit");
  if (!want_checksums_) throw argument_error("checksums of " + path_.string() + ": WriterOptions did not ask for them");
  settle("checksums of");
  Checksums checksums{.size_bytes = payload_bytes_};
  for (std::uint64_t begin = 0; begin < payload_bytes_; begin += Checksums::kPieceBytes) {
    const std::uint64_t size = std::min<std::uint64_t>(Checksums::kPieceBytes, payload_bytes_ - begin);
    checksums.crc32c.push_back(sums_.crc32c(begin / Checksums::kPieceBytes, static_cast<std::uint32_t>(size)));
  }
  return checksums;
}

void FileWriter::Impl::commit(std::span<const std::byte> tail) {
  engine_.require_owner();
  if (!file_) throw argument_error("commit " + path_.string() + ": committed or aborted before");
  try {
    settle("commit");
    write_tail(tail);
    if (::fdatasync(file_->buffered_fd()) != 0) throw file_error(errno_code(errno), "sync", path_);
    if (::rename(temp_path_.c_str(), path_.c_str()) != 0)
      throw file_error(errno_code(errno), "rename into place", path_);
  } catch (...) {
    abort();
    throw;
  }
  committed_ = true;
  file_.reset();
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
  return impl_->start_write(extents, completion, stream);
}

TransferStats FileWriter::write(std::vector<SourceExtent> extents, CUstream_st* stream) {
  return start_write(std::move(extents), nullptr, stream).wait();
}

Checksums FileWriter::checksums() { return impl_->checksums(); }

void FileWriter::commit(std::span<const std::byte> tail) { impl_->commit(tail); }

}  // namespace flashpack
