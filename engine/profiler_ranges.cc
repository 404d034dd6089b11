#include "engine/profiler_ranges.h"

#include <string>

#include "engine/transfer_state.h"

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>

namespace flashpack::internal {

ProfilerRanges::ProfilerRanges() noexcept : domain_(nvtxDomainCreateA("flashpack")) {}

std::uint64_t ProfilerRanges::begin(const TransferState& transfer) const {
  if (!domain_) return 0;
  const std::string text = std::string(transfer.verb()) + " " + transfer.driver.path().string();
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = text.c_str();
  return nvtxDomainRangeStartEx(domain_, &attributes);
}

void ProfilerRanges::end(std::uint64_t range) const noexcept {
  if (domain_) nvtxDomainRangeEnd(domain_, range);
}

}  // namespace flashpack::internal

#else

namespace flashpack::internal {

ProfilerRanges::ProfilerRanges() noexcept = default;
std::uint64_t ProfilerRanges::begin(const TransferState&) const { return 0; }
void ProfilerRanges::end(std::uint64_t) const noexcept {}

}  // namespace flashpack::internal

#endif
