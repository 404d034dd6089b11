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

// While one window is checked, the next is being read.
constexpr std::uint64_t kWindowBytes = std::uint64_t{64} << 20;

/// Returns `error`; if it is of Errc::kCorrupt, with the tensors in the stripe named, too.
Error with_tensors(const Error& error, const Metadata& metadata) {
  if (error.code() != Errc::kCorrupt) return error;
  const std::uint64_t begin = error.offset_bytes();
  const std::uint64_t size = std::min<std::uint64_t>(Checksums::kStripeBytes, metadata.payload_bytes - begin);
  return {error.code(),
          "verify " + error.path().string() + " at " + std::to_string(begin) + "+" + std::to_string(size) + ", where " +
              TensorsByOffset(metadata).names_in(begin, size) + " lies",
          error.path(), begin};
}

/// Throws: Error (kInvalidArgument) unless all bytes that were read have been verified.
std::uint64_t all_verified(const TransferStats& stats, const std::filesystem::path& path) {
  if (stats.verified_bytes == stats.requested_bytes) return stats.verified_bytes;
  throw Error(Errc::kInvalidArgument,
              "verify " + path.string() + ": only " + std::to_string(stats.verified_bytes) + " of the " +
                  std::to_string(stats.requested_bytes) + " bytes that were read could be held against checksums",
              path);
}

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
    for (; offset < end; offset += Checksums::kStripeBytes) {
      const std::uint64_t size = std::min<std::uint64_t>(Checksums::kStripeBytes, end - offset);
      try {
        report_.verified_bytes += all_verified(engine_.load(request(offset, size, spare_.data())), path_);
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
  internal::HostRegion spare_{kWindowBytes, "verification"};
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

TensorsByOffset::TensorsByOffset(const Metadata& metadata) {
  for (const TensorRecord& record : metadata.records) {
    if (record.size_bytes > 0) records_.push_back(&record);
  }
  std::ranges::sort(records_, {}, &TensorRecord::offset_bytes);
}

std::string TensorsByOffset::names_in(std::uint64_t offset_bytes, std::uint64_t size_bytes) const {
  constexpr std::ptrdiff_t kNamed = 5;
  const auto first = std::ranges::partition_point(
      records_, [&](const TensorRecord* record) { return record->offset_bytes + record->size_bytes <= offset_bytes; });
  const auto last =
      std::ranges::lower_bound(first, records_.end(), offset_bytes + size_bytes, {}, &TensorRecord::offset_bytes);
  if (first == last) return "no tensor";
  std::string names;
  for (auto record = first; record != last && record - first < kNamed; ++record)
    names += (names.empty() ? "" : ", ") + rules::quoted((*record)->name);
  if (last - first > kNamed) names += " and " + std::to_string(last - first - kNamed) + " more";
  return names;
}

const Checksums* checksums_for(const Metadata& metadata, Verify verify, const std::filesystem::path& path) {
  if (verify == Verify::kNever) return nullptr;
  if (verify == Verify::kAlways && !metadata.checksums) rules::refuse(path, "it has no checksums to verify");
  return metadata.checksums ? &*metadata.checksums : nullptr;
}

FileExtents extents_in(const CheckpointFile& file, std::vector<Extent> extents, Verify verify) {
  return {.path = file.path,
          .extents = std::move(extents),
          .expected = file.metadata.identity,
          .checksums = checksums_for(file.metadata, verify, file.path),
          .fd = file.fd};
}

TransferStats verified(const Checkpoint& checkpoint, Verify verify, const std::function<TransferStats()>& wait) {
  TransferStats stats;
  try {
    stats = wait();
  } catch (const Error& error) {
    const auto file = std::ranges::find(checkpoint.files(), error.path(), &CheckpointFile::path);
    if (file == checkpoint.files().end()) throw;
    throw with_tensors(error, file->metadata);
  }
  if (verify == Verify::kAlways) all_verified(stats, checkpoint.path());
  return stats;
}

}  // namespace flashpack
