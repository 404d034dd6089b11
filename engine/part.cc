#include "engine/part.h"

#include <algorithm>

#include "engine/ground/error.h"

namespace flashpack::internal {

std::uint64_t compare_stripes(const PartRequest& request, const PlannedFile& planned, std::uint64_t begin_bytes,
                              std::uint64_t end_bytes) {
  constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
  const WantedChecksums& wanted = *request.checksums;
  const StripeSums& sums = *planned.sums;
  end_bytes = std::min({end_bytes, wanted.payload_bytes, sums.end() * kStripeBytes});
  std::uint64_t compared_bytes = 0;
  for (std::uint64_t index = std::max(begin_bytes / kStripeBytes, sums.first()); index * kStripeBytes < end_bytes;
       ++index) {
    const std::uint64_t begin = index * kStripeBytes;
    const auto size = static_cast<std::uint32_t>(std::min(kStripeBytes, wanted.payload_bytes - begin));
    if (sums.counted_bytes(index) != size) continue;
    if (sums.crc32c(index, size) != wanted.crc32c[index - wanted.first_stripe])
      throw range_error(Errc::kCorrupt, "verify", request.path, begin, size);
    compared_bytes += size;
  }
  return compared_bytes;
}

PartResult check_part(const PartRequest& request, const PlannedFile& planned) noexcept {
  PartResult result;
  try {
    if (const std::error_code error = planned.file().check_unchanged())
      throw file_error(error, error == Errc::kFileChanged ? "read" : "stat", request.path);
    if (planned.sums) result.verified_bytes = compare_stripes(request, planned, 0, request.checksums->payload_bytes);
  } catch (...) {
    result.failure = Failure::of_exception("verify", request.path);
  }
  return result;
}

}  // namespace flashpack::internal
