#include "flashpack/file_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <utility>

#include "engine/engine_impl.h"
#include "engine/ground/error.h"
#include "engine/ground/system_call.h"

namespace flashpack {

using internal::argument_error;
using internal::errno_code;
using internal::file_error;
using internal::range_error;
using internal::uninterrupted;

FileWriter::Impl::Impl(Engine::Impl& engine, const std::filesystem::path& path, const WriterOptions& options)
    : engine_(engine),
      path_(options.follow_links ? internal::resolve_links(path) : internal::absolute_path(path)),
      temp_(path_,
            options.follow_links ? internal::TempFile::Links::kAreRefused : internal::TempFile::Links::kAreReplaced),
      payload_bytes_(options.payload_bytes),
      want_checksums_(options.checksums) {
  UniqueFd fd = temp_.create();
  open_ = internal::FileUse(internal::File::created(temp_.path(), std::move(fd)), engine_.facts().disk);
  reserve(0, payload_bytes_);
}

FileWriter::Impl::~Impl() { abort(); }

void FileWriter::Impl::abort() noexcept {
  if (!engine_.owner().is_current()) {
    for (auto& transfer : transfers_) detail::leave_to_parent(transfer);
    return;
  }
  for (const auto& transfer : transfers_) Transfer cancelled_and_waited_for = internal::TransferState::handle(transfer);
  transfers_.clear();
  temp_.remove();
  open_ = {};
}

// Reserves space, so that a full disk is an error at the start, and writes need not grow the file, which the kernel
// does one at a time. This is skipped if the file system cannot reserve (EOPNOTSUPP), and if signals interrupt it,
// because it would start again after each of them.
void FileWriter::Impl::reserve(std::uint64_t begin_bytes, std::uint64_t end_bytes) {
  begin_bytes = std::max(begin_bytes, reserved_bytes_);
  if (end_bytes <= begin_bytes) return;
  const auto begin = static_cast<off_t>(begin_bytes);
  const auto size = static_cast<off_t>(end_bytes - begin_bytes);
  constexpr int kMaxAttempts = 20;  // A bound for a thread that gets signals all the time, and not tuned.
  bool reserved = false;
  for (int attempt = 0; attempt < kMaxAttempts && !reserved; ++attempt) {
    reserved = ::fallocate(open_->file.buffered_fd(), 0, begin, size) == 0;
    if (!reserved && errno != EINTR) break;
  }
  if (!reserved && errno != EINTR && errno != EOPNOTSUPP && errno != ENOSYS) {
    throw range_error(errno_code(errno), "reserve space for", path_, begin_bytes, end_bytes - begin_bytes);
  }
  reserved_bytes_ = end_bytes;
}

// Returns the ranges that a write of `extents`, which are sorted by offset, covers: the extents, and the zeros between
// them. Throws if a byte is already covered.
FileWriter::Impl::Claims FileWriter::Impl::claims_of(std::span<const internal::Fragment> extents) const {
  Claims claims;
  const std::uint64_t max_gap_bytes = internal::Plan::zeros_between(extents, open_->file.alignment());
  for (std::size_t i = 0; i < extents.size(); ++i) {
    const std::uint64_t begin = extents[i].offset_bytes;
    std::uint64_t end = end_of(extents[i]);
    const std::uint64_t next = i + 1 < extents.size() ? extents[i + 1].offset_bytes : end;
    if (next > end && next - end <= max_gap_bytes) end = next;
    const auto after = claimed_.upper_bound(begin);
    const bool before_overlaps = after != claimed_.begin() && std::prev(after)->second > begin;
    const bool after_overlaps = after != claimed_.end() && after->first < end;
    const auto last = claims.empty() ? claims.end() : std::prev(claims.end());
    if (before_overlaps || after_overlaps || (last != claims.end() && last->second > begin))
      throw argument_error("write", path_, "the bytes at " + std::to_string(begin) + " twice");
    if (last != claims.end() && last->second == begin) {
      last->second = end;
    } else {
      claims.emplace_hint(claims.end(), begin, end);
    }
  }
  return claims;
}

// Adds the checksums of writes that have succeeded to `sums_` and forgets those writes, so that a writer with many
// calls keeps few transfers.
void FileWriter::Impl::forget_those_that_ended_well() {
  std::erase_if(transfers_, [this](const auto& earlier) {
    if (!earlier->end.reached() || earlier->end.failure()) return false;
    if (const internal::StripeSums* const sums = earlier->driver.sums()) sums_.add(*sums);
    return true;
  });
}

Transfer FileWriter::Impl::start_write(const WriteRequest& request, Completion* completion) {
  engine_.owner().require_current("engine");
  if (!open_) throw argument_error("write", path_, "after commit");
  std::vector<internal::Fragment> extents = internal::extents_of(engine_.facts(), request, path_);
  Claims claims = claims_of(extents);
  const std::uint64_t begin = extents.empty() ? 0 : extents.front().offset_bytes;
  std::uint64_t payload_bytes = extents.empty() ? 0 : std::max(payload_bytes_, end_of(extents.back()));
  auto state = internal::prepare_store(engine_.facts(), {path_, open_, want_checksums_}, request, std::move(extents),
                                       completion);
  reserve(begin, payload_bytes);
  forget_those_that_ended_well();
  const Claims if_it_fails = claims;
  // Added before the start, because a completion may lead to commit() on another thread before start() returns.
  transfers_.push_back(state);
  claimed_.merge(claims);
  assert(claims.empty() && "they were held against those of before");
  payload_bytes = std::exchange(payload_bytes_, std::max(payload_bytes, payload_bytes_));
  try {
    engine_.start(state);
  } catch (...) {
    transfers_.pop_back();
    for (const auto& claim : if_it_fails) claimed_.erase(claim.first);
    payload_bytes_ = payload_bytes;
    throw;
  }
  return internal::TransferState::handle(std::move(state));
}

// Throws unless every transfer has ended without an error. A transfer whose completion is still running counts as
// ended, because that completion may have led to this call on another thread.
void FileWriter::Impl::take_results(const char* verb) {
  for (const auto& state : transfers_) {
    if (!state->end.reached()) throw argument_error(verb, path_, "a write has not finished");
    if (const internal::Failure* const failure = state->end.failure()) throw failure->error();
  }
  for (const auto& state : transfers_) {
    if (const internal::StripeSums* const sums = state->driver.sums()) sums_.add(*sums);
  }
  transfers_.clear();
}

void FileWriter::Impl::write_tail(std::span<const std::byte> tail) {
  for (std::uint64_t done = 0; done < tail.size();) {
    const auto offset = static_cast<off_t>(payload_bytes_ + done);
    const auto n = uninterrupted(
        [&] { return ::pwrite(open_->file.buffered_fd(), tail.data() + done, tail.size() - done, offset); });
    if (n <= 0)
      throw range_error(errno_code(n < 0 ? errno : EIO), "write", path_, payload_bytes_ + done, tail.size() - done);
    done += static_cast<std::uint64_t>(n);
  }
  // Cuts off reserved space that was not used, or extends the file with zeros that were never written.
  const auto size = static_cast<off_t>(payload_bytes_ + tail.size());
  if (uninterrupted([&] { return ::ftruncate(open_->file.buffered_fd(), size); }) != 0)
    throw file_error(errno_code(errno), "truncate", path_);
}

Checksums FileWriter::Impl::checksums() {
  engine_.owner().require_current("engine");
  if (!open_) throw argument_error("checksums of", path_, "after commit");
  if (!want_checksums_) throw argument_error("checksums of", path_, "the options of the writer did not ask for them");
  take_results("checksums of");
  Checksums checksums{.size_bytes = payload_bytes_};
  for (std::uint64_t begin = 0; begin < payload_bytes_; begin += Checksums::kStripeBytes) {
    const std::uint64_t size = std::min<std::uint64_t>(Checksums::kStripeBytes, payload_bytes_ - begin);
    checksums.crc32c.push_back(sums_.crc32c(begin / Checksums::kStripeBytes, static_cast<std::uint32_t>(size)));
  }
  return checksums;
}

void FileWriter::Impl::commit(std::span<const std::byte> tail) {
  engine_.owner().require_current("engine");
  if (!open_) throw argument_error("commit", path_, "committed or aborted before");
  try {
    take_results("commit");
    write_tail(tail);
    temp_.commit(open_->file.buffered_fd());
  } catch (...) {
    abort();
    throw;
  }
  open_ = {};
  temp_.sync_directory();
}

FileWriter::FileWriter(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
FileWriter::FileWriter(FileWriter&&) noexcept = default;
FileWriter& FileWriter::operator=(FileWriter&&) noexcept = default;
FileWriter::~FileWriter() = default;

Transfer FileWriter::start_write(WriteRequest request, Completion* completion) {
  return impl_->start_write(request, completion);
}

TransferStats FileWriter::write(WriteRequest request) { return start_write(std::move(request)).wait(); }

Checksums FileWriter::checksums() { return impl_->checksums(); }

void FileWriter::commit(std::span<const std::byte> tail) { impl_->commit(tail); }

Transfer FileWriter::start_write(WriteRequest request, Completion* completion, std::error_code& error) noexcept {
  return internal::value_or_code<Transfer>(error, [&] { return impl_->start_write(request, completion); });
}

Checksums FileWriter::checksums(std::error_code& error) noexcept {
  return internal::value_or_code<Checksums>(error, [&] { return impl_->checksums(); });
}

void FileWriter::commit(std::span<const std::byte> tail, std::error_code& error) noexcept {
  internal::catching(error, [&] { impl_->commit(tail); });
}

}  // namespace flashpack
