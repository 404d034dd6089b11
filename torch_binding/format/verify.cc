#include "flashpack/verify.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <utility>

#include "engine/ground/host_region.h"
#include "engine/ground/unique_fd.h"
#include "torch_binding/format/format_rules.h"
#include "torch_binding/format/verified.h"

namespace flashpack {

namespace {

// While one window is checked, the next is being read. The size bounds the memory, and is not tuned: it is twice what a
// disk has in flight by default.
constexpr std::uint64_t kWindowBytes = std::uint64_t{64} << 20;

class Verifier {
 public:
  Verifier(Engine& engine, int fd, const std::filesystem::path& path, const Metadata& metadata)
      : engine_(engine), fd_(fd), path_(path), metadata_(metadata) {
    checksums_for(metadata, Verify::kAlways, path);
  }

  VerifyReport run(const std::function<void(std::uint64_t)>& progress) {
    const auto start = std::chrono::steady_clock::now();
    const std::uint64_t end = metadata_.payload_bytes;
    begin(0);
    for (std::uint64_t offset = 0; offset < end; offset += kWindowBytes) {
      begin(offset + kWindowBytes);
      finish(offset);
      if (progress) progress(std::min(offset + kWindowBytes, end));
    }
    name_tensors();
    report_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return std::move(report_);
  }

 private:
  struct Window {
    internal::HostRegion memory{kWindowBytes, "verification"};
    Transfer transfer;  // The last member, because it must end before its memory goes.
  };

  Window& window(std::uint64_t offset) { return windows_[offset / kWindowBytes % windows_.size()]; }

  LoadRequest request(std::uint64_t offset, std::uint64_t size, void* memory) const {
    LoadRequest request;
    request.files.push_back({.path = path_,
                             .extents = {{offset, size, memory}},
                             .expected = metadata_.identity,
                             .checksums = &*metadata_.checksums,
                             .fd = fd_});
    return request;
  }

  void begin(std::uint64_t offset) {
    if (offset >= metadata_.payload_bytes) return;
    const std::uint64_t size = std::min(kWindowBytes, metadata_.payload_bytes - offset);
    Window& next = window(offset);
    next.transfer = engine_.start_load(request(offset, size, next.memory.data()));
  }

  void finish(std::uint64_t offset) {
    try {
      report_.verified_bytes += all_verified(window(offset).transfer.wait(), path_);
    } catch (const Error& error) {
      if (error.code() != Errc::kCorrupt) throw;
      find_corrupt_stripes(offset);
    }
  }

  // A transfer names only its first corrupt stripe, so each stripe is loaded alone.
  void find_corrupt_stripes(std::uint64_t offset) {
    const std::uint64_t end = std::min(offset + kWindowBytes, metadata_.payload_bytes);
    std::byte* const memory = window(offset).memory.data();
    for (; offset < end; offset += Checksums::kStripeBytes) {
      const std::uint64_t size = std::min<std::uint64_t>(Checksums::kStripeBytes, end - offset);
      try {
        report_.verified_bytes += all_verified(engine_.load(request(offset, size, memory)), path_);
      } catch (const Error& error) {
        if (error.code() != Errc::kCorrupt) throw;
        report_.corrupt.push_back({.offset_bytes = offset, .size_bytes = size});
      }
    }
  }

  void name_tensors() {
    if (report_.corrupt.empty()) return;
    const TensorsByOffset tensors(metadata_);
    for (VerifyReport::Stripe& stripe : report_.corrupt)
      stripe.tensors = tensors.names_in(stripe.offset_bytes, stripe.size_bytes);
  }

  Engine& engine_;
  const int fd_;
  const std::filesystem::path& path_;
  const Metadata& metadata_;
  VerifyReport report_;
  std::array<Window, 2> windows_;
};

}  // namespace

VerifyReport verify_payload(Engine& engine, const std::filesystem::path& path, const Metadata& metadata,
                            const std::function<void(std::uint64_t done_bytes)>& progress) {
  return verify_payload(engine, internal::open_file(path).get(), path, metadata, progress);
}

VerifyReport verify_payload(Engine& engine, int fd, const std::filesystem::path& path, const Metadata& metadata,
                            const std::function<void(std::uint64_t done_bytes)>& progress) {
  return Verifier(engine, fd, path, metadata).run(progress);
}

}  // namespace flashpack
