#include "torch_binding/format/verified.h"

#include <algorithm>
#include <utility>

#include "torch_binding/format/format_rules.h"

namespace flashpack {

namespace {

/// Returns `error`; if it is of Errc::kCorrupt and of one file alone, with the tensors in the stripe named, too.
Error with_tensors(const Error& error, const Metadata& metadata) {
  if (error.code() != Errc::kCorrupt || !error.files().empty()) return error;
  const std::uint64_t begin = error.offset_bytes();
  const std::uint64_t size = std::min<std::uint64_t>(Checksums::kStripeBytes, metadata.payload_bytes - begin);
  return {error.code(),
          "verify " + error.path().string() + " at " + std::to_string(begin) + "+" + std::to_string(size) + ", where " +
              TensorsByOffset(metadata).names_in(begin, size) + " lies",
          error.path(), begin};
}

}  // namespace

std::uint64_t all_verified(const TransferStats& stats, const std::filesystem::path& path) {
  if (stats.verified_bytes == stats.requested_bytes) return stats.verified_bytes;
  throw Error(Errc::kInvalidArgument,
              "verify " + path.string() + ": only " + std::to_string(stats.verified_bytes) + " of the " +
                  std::to_string(stats.requested_bytes) + " bytes that were read could be held against checksums",
              path);
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

std::vector<FileExtents> files_of(const Checkpoint& checkpoint, std::vector<std::vector<Extent>> extents,
                                  Verify verify) {
  std::vector<FileExtents> files;
  for (std::size_t i = 0; i < extents.size(); ++i) {
    if (extents[i].empty()) continue;
    const CheckpointFile& file = checkpoint.files()[i];
    files.push_back({.path = file.path,
                     .extents = std::move(extents[i]),
                     .expected = file.metadata.identity,
                     .checksums = checksums_for(file.metadata, verify, file.path),
                     .fd = file.fd.get()});
  }
  return files;
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
