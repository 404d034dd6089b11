#include "engine/part.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <exception>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>

#include "engine/byte_work.h"
#include "engine/ground/error.h"
#include "engine/residency.h"

namespace flashpack::internal {

namespace {

bool overlap(std::span<const Fragment> in_order) {
  const auto overlap = [](const Fragment& a, const Fragment& b) { return b.offset_bytes < end_of(a); };
  return std::adjacent_find(in_order.begin(), in_order.end(), overlap) != in_order.end();
}

// Has the bytes of the load counted for `checksums`. The counts of a stripe's bytes are added by exclusive or, so that
// bytes that are counted twice drop out of the sum, and right bytes would look corrupt. Therefore nothing is counted if
// any byte is read twice: if extents overlap, or if a chunk reaches over a gap that another chunk reads.
void count_for(const Checksums& checksums, Part& part) {
  if (checksums.size_bytes > part.file().identity().size_bytes)
    throw range_error(Errc::kTruncated, "verify", part.path, 0, checksums.size_bytes);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
  bool twice = false;
  for (const Chunk& chunk : part.plan.chunks) {
    ranges.emplace_back(chunk.offset_bytes, end_of(chunk));
    twice |= overlap(part.plan.fragments_of(chunk));
  }
  if (ranges.empty()) return;
  std::sort(ranges.begin(), ranges.end());
  twice |= std::adjacent_find(ranges.begin(), ranges.end(),
                              [](const auto& a, const auto& b) { return b.first < a.second; }) != ranges.end();
  if (twice) {
    part.fallback_reason = "checksums: not verified, extents overlap in the file";
  } else {
    part.sums.emplace(ranges.front().first, std::min(ranges.back().second, checksums.size_bytes));
  }
}

// Reads a small load from the page cache, without waiting for the disk. This costs less than to hand chunks from thread
// to thread.
bool read_at_once(Part& part, const File& file, std::uint32_t at_once_bytes) {
  if (part.extents.empty() || part.checksums || part.cache == CachePolicy::kDirect) return false;
  std::uint64_t begin = file.identity().size_bytes;
  std::uint64_t end = 0;
  std::uint64_t bytes = 0;
  for (const Fragment& extent : part.extents) {
    if (extent.on_device) return false;
    begin = std::min(begin, extent.offset_bytes);
    end = std::max(end, end_of(extent));
    bytes += extent.size_bytes;
  }
  if (end > file.identity().size_bytes || end - begin > at_once_bytes || bytes > at_once_bytes) return false;
  if (part.cache == CachePolicy::kAuto) {
    Residency residency(file.buffered_fd());
    // Without cachestat, the question itself reads a page, which the router would then find cached.
    if (residency.method() != Residency::Method::kCachestat || !residency.cached(begin, end - begin)) return false;
    part.fallback_reason = residency.fallback_reason();
  }
  if (!part.claim_memory()) return false;
  const bool read = read_without_waiting(file.buffered_fd(), part.extents) == 0;
  if (read) part.read_bytes = bytes;
  part.memory_claimed = false;
  return read;
}

void open_and_plan(Part& part, FileTable& files, std::uint32_t chunk_bytes, std::uint32_t at_once_bytes) {
  const bool want_direct = part.cache != CachePolicy::kBuffered;
  const bool may_be_opened_again = !part.given && !part.alone;
  part.open = files.open(part.path, part.expected, want_direct, std::move(part.given),
                         [&](const File& file) { return read_at_once(part, file, at_once_bytes); });
  if (part.read_bytes > 0) return;
  const File& file = part.file();
  const std::error_code direct_error = errno_code(want_direct && file.direct_fd() < 0 ? file.direct_error() : 0);
  if (may_be_opened_again && no_descriptors(direct_error)) {
    part.open.reset();
    throw file_error(direct_error, "open", part.path);
  }
  for (const Fragment& extent : part.extents) {
    if (end_of(extent) <= file.identity().size_bytes) continue;
    throw range_error(Errc::kTruncated, "read", part.path, extent.offset_bytes, extent.size_bytes);
  }
  part.plan = Plan::of_load(std::exchange(part.extents, {}), chunk_bytes, file.alignment().block_bytes);
  if (direct_error) part.fallback_reason = "direct I/O: " + direct_error.message();
  if (part.checksums) count_for(*part.checksums, part);
  if (part.reported_extents > 0) part.landing.emplace(part.plan, part.reported_extents, part.sums ? chunk_bytes : 0);
  part.router = Router(part.plan, file, part.cache);
}

}  // namespace

Failure Failure::of_exception(const char* operation, const std::filesystem::path& path) {
  try {
    throw;
  } catch (const Error& error) {
    return Failure(error);
  } catch (const std::system_error& error) {
    return Failure(file_error(error.code(), operation, path));
  } catch (const std::bad_alloc&) {
    return Failure(file_error(errno_code(ENOMEM), operation, path));
  } catch (const std::length_error&) {  // More than a container may have.
    return Failure(file_error(errno_code(ENOMEM), operation, path));
  } catch (const std::exception& error) {  // A fault of this library.
    const std::string context = std::string(operation) + " " + path.string() + ": " + error.what();
    return Failure(Error(errno_code(ENOTRECOVERABLE), context, path));
  }
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

void open_part(Part& part, FileTable& files, std::uint32_t chunk_bytes, std::uint32_t at_once_bytes) noexcept {
  assert(!part.open && !part.failure && part.plan.chunks.empty());
  try {
    open_and_plan(part, files, chunk_bytes, at_once_bytes);
  } catch (...) {
    part.failure = Failure::of_exception("open", part.path);
  }
  if (part.failure || part.read_bytes == 0) return;
  check_part(part);
  const std::shared_ptr<OpenFile> closed_last = std::move(part.open);
  part.checked = true;
}

std::uint64_t compare_stripes(const Part& part, std::uint64_t begin_bytes, std::uint64_t end_bytes) {
  constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
  end_bytes = std::min({end_bytes, part.checksums->size_bytes, part.sums->end() * kStripeBytes});
  std::uint64_t compared_bytes = 0;
  for (std::uint64_t index = std::max(begin_bytes / kStripeBytes, part.sums->first()); index * kStripeBytes < end_bytes;
       ++index) {
    const std::uint64_t begin = index * kStripeBytes;
    const auto size = static_cast<std::uint32_t>(std::min(kStripeBytes, part.checksums->size_bytes - begin));
    if (part.sums->counted_bytes(index) != size) continue;
    if (part.sums->crc32c(index, size) != part.checksums->crc32c[index - part.first_stripe])
      throw range_error(Errc::kCorrupt, "verify", part.path, begin, size);
    compared_bytes += size;
  }
  return compared_bytes;
}

bool no_descriptors(std::error_code error) {
  return error == std::errc::too_many_files_open || error == std::errc::too_many_files_open_in_system;
}

void check_part(Part& part) noexcept {
  assert(part.open);
  try {
    if (!part.file().unchanged()) throw file_error(Errc::kFileChanged, "read", part.path);
    if (part.sums) part.verified_bytes = compare_stripes(part, 0, part.checksums->size_bytes);
  } catch (...) {
    part.failure = Failure::of_exception("verify", part.path);
  }
}

}  // namespace flashpack::internal
