#include "engine/open_part.h"

#include <algorithm>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

#include "engine/byte_work.h"
#include "engine/ground/error.h"
#include "engine/ground/reasons.h"
#include "engine/residency.h"

namespace flashpack::internal {

namespace {

bool overlap_in_order(std::span<const Fragment> in_order) {
  const auto overlap = [](const Fragment& a, const Fragment& b) { return b.offset_bytes < end_of(a); };
  return std::adjacent_find(in_order.begin(), in_order.end(), overlap) != in_order.end();
}

bool overlap(std::vector<Fragment> extents) {
  std::ranges::sort(extents, {}, &Fragment::offset_bytes);
  return overlap_in_order(extents);
}

// Has the bytes of the load counted, so that they can be compared with the checksums. The counts of a stripe's bytes
// are added by exclusive or, so that bytes that are counted twice drop out of the sum, and right bytes would look
// corrupt. Therefore nothing is counted if any byte is read twice: if extents overlap, or if a chunk reads a gap
// between its extents, such as 0 to 4096 with 8192 to 12288, and another chunk has an extent in that gap.
void count_for_checksums(const PartRequest& request, PlannedFile& planned) {
  const std::uint64_t payload_bytes = request.checksums->payload_bytes;
  if (payload_bytes > planned.file().identity().size_bytes)
    throw range_error(Errc::kTruncated, "verify", request.path, 0, payload_bytes);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
  bool twice = false;
  for (const Chunk& chunk : planned.plan.chunks) {
    ranges.emplace_back(chunk.offset_bytes, end_of(chunk));
    twice |= overlap_in_order(planned.plan.fragments_of(chunk));
  }
  if (ranges.empty()) return;
  std::sort(ranges.begin(), ranges.end());
  twice |= std::adjacent_find(ranges.begin(), ranges.end(),
                              [](const auto& a, const auto& b) { return b.first < a.second; }) != ranges.end();
  if (twice) {
    add_reason(planned.fallback_reason,
               overlap(request.extents) ? "checksums: not verified, extents overlap in the file"
                                        : "checksums: not verified, one read covers a gap in which another one reads");
  } else {
    planned.sums.emplace(ranges.front().first, std::min(ranges.back().second, payload_bytes));
  }
}

// Why the file has no direct I/O although the load wants it; empty if neither is so.
std::error_code direct_error(const PartRequest& request, const File& file) {
  const bool lacks_it = request.cache != CachePolicy::kBuffered && file.direct_fd() < 0;
  return lacks_it ? file.direct_error() : std::error_code();
}

// The result of a load that may be read at once; empty if it may not.
std::optional<PartResult> at_once(const PartRequest& request, const File& file, const Residency* known,
                                  std::uint32_t at_once_bytes) {
  if (request.extents.empty() || request.checksums || request.cache == CachePolicy::kDirect) return std::nullopt;
  std::uint64_t begin = file.identity().size_bytes;
  std::uint64_t end = 0;
  PartResult result;
  for (const Fragment& extent : request.extents) {
    if (extent.device != kHost) return std::nullopt;
    begin = std::min(begin, extent.offset_bytes);
    end = std::max(end, end_of(extent));
    result.read_bytes += extent.size_bytes;
  }
  if (end > file.identity().size_bytes || end - begin > at_once_bytes || result.read_bytes > at_once_bytes)
    return std::nullopt;
  if (request.cache == CachePolicy::kAuto) {
    Residency residency = known ? known->borrow() : Residency(file.buffered_fd());
    // Without cachestat, the question itself reads a page, which the router would then find cached.
    if (residency.method() != Residency::Method::kCachestat || !residency.seems_cached(begin, end - begin))
      return std::nullopt;
    result.fallback_reason = residency.fallback_reason();
  }
  return result;
}

}  // namespace

bool may_read_at_once(const PartRequest& request, const File& file, const Residency& known,
                      std::uint32_t at_once_bytes) {
  return at_once(request, file, &known, at_once_bytes).has_value();
}

std::optional<PartResult> read_at_once(const PartRequest& request, const File& file, const Residency* known,
                                       Handover& handover, std::uint32_t at_once_bytes) {
  std::optional<PartResult> result = at_once(request, file, known, at_once_bytes);
  if (!result) return std::nullopt;
  if (!handover.claim_memory()) return std::nullopt;
  const bool read = read_without_waiting(file.buffered_fd(), request.extents) == 0;
  handover.release_memory();
  if (!read) return std::nullopt;
  return result;
}

void plan_load(const PartRequest& request, std::uint32_t chunk_bytes, PlannedFile& planned) {
  const File& file = planned.file();
  for (const Fragment& extent : request.extents) {
    if (end_of(extent) <= file.identity().size_bytes) continue;
    throw range_error(Errc::kTruncated, "read", request.path, extent.offset_bytes, extent.size_bytes);
  }
  if (const std::error_code error = direct_error(request, file))
    add_reason(planned.fallback_reason, "direct I/O: " + error.message());
  planned.plan = Plan::of_load(request.extents, chunk_bytes, file.alignment().block_bytes);
  if (request.checksums) count_for_checksums(request, planned);
  if (request.reported_extents > 0)
    planned.landing.emplace(planned.plan, request.reported_extents, planned.sums ? chunk_bytes : 0);
  const auto& known = planned.open->residency;
  planned.router = Router(planned.plan, file, request.cache, known ? &*known : nullptr);
}

Opened open_part(const PartRequest& request, UniqueFd given, Handover& handover, FileTable& files, OpenRules rules,
                 bool may_wait_for_descriptors) noexcept {
  Opened opened;
  try {
    const bool want_direct = request.cache != CachePolicy::kBuffered;
    std::optional<PartResult> read;
    const auto serve = [&](const File& file) {
      read = read_at_once(request, file, nullptr, handover, rules.at_once_bytes);
      return read.has_value();
    };
    FileUse open = files.open(request.path, request.expected, want_direct, std::move(given), serve);
    auto planned = std::make_unique<PlannedFile>(PlannedFile{.open = std::move(open)});
    if (read) {
      PartResult checked = check_part(request, *planned);
      checked.read_bytes = read->read_bytes;
      checked.fallback_reason = std::move(read->fallback_reason);
      handover.end(std::move(checked));
      return opened;  // Closes the file.
    }
    const std::error_code error = direct_error(request, planned->file());
    if (may_wait_for_descriptors && no_descriptors(error)) throw file_error(error, "open", request.path);
    opened.planned = std::move(planned);  // From here on, also after a failure, the driver has the file closed.
    plan_load(request, rules.chunk_bytes, *opened.planned);
  } catch (...) {
    opened.failure = Failure::of_exception("open", request.path);
  }
  return opened;
}

bool no_descriptors(std::error_code error) {
  return error == std::errc::too_many_files_open || error == std::errc::too_many_files_open_in_system;
}

}  // namespace flashpack::internal
