/// Shows transfers to a profiler that knows NVTX, as Nsight Systems does.
#pragma once

#include <cstdint>

struct nvtxDomainRegistration_st;

namespace flashpack::internal {

struct TransferState;

/// Ranges of the domain "flashpack", one for each transfer, in the profiler that is attached to the process. Without a
/// profiler, and in builds without NVTX's headers, this does nothing.
///
/// Thread safety: any thread.
class ProfilerRanges {
 public:
  ProfilerRanges() noexcept;

  /// Begins the range of a transfer, and returns its number, which end() takes.
  std::uint64_t begin(const TransferState& transfer) const;
  void end(std::uint64_t range) const noexcept;

 private:
  nvtxDomainRegistration_st* domain_ = nullptr;  // Null if nobody looks. NVTX keeps it for the process.
};

}  // namespace flashpack::internal
