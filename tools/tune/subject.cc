#include "tools/tune/subject.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "bench/support/page_cache.h"
#include "bench/support/roofline.h"
#include "engine/ground/option_limits.h"
#include "engine/ground/units.h"
#include "tools/tune/written_file.h"

namespace flashpack::bench {

namespace {

std::uint64_t size_of(const LoadRequest& request) {
  std::uint64_t bytes = 0;
  for (const Extent& extent : request.files.front().extents) bytes += extent.size_bytes;
  return bytes;
}

Sample sample_write(Subject& subject, const Setting& setting) {
  Engine engine(options_of(setting, subject.device));
  WriteRequest request;
  for (const Extent& extent : subject.from_disk.files.front().extents)
    request.extents.push_back({extent.offset_bytes, extent.size_bytes, extent.target});
  const std::filesystem::path path = subject.checkpoint.path().string() + ".written";
  // To replace a file would free its blocks, too.
  const WrittenFile written(path);
  // The engine takes its staging memory at its first write, which is not to be measured.
  engine.create(path).write({.extents = {{0, 4097, subject.target}}});
  return measure([&] {
    FileWriter writer = engine.create(path, {.payload_bytes = size_of(subject.from_disk)});
    subject.fallback_reason = writer.write(request).fallback_reason;
    writer.commit();
  });
}

// Less would be read before a disk is busy.
constexpr std::uint64_t kLeastSampleBytes = 64 * internal::kMiB;

std::vector<Extent> first_part(const std::vector<Extent>& all, std::uint64_t bytes) {
  std::vector<Extent> part;
  for (const Extent& extent : all) {
    if (bytes == 0) break;
    part.push_back(extent);
    part.back().size_bytes = std::min(extent.size_bytes, bytes);
    bytes -= part.back().size_bytes;
  }
  return part;
}

// An engine's threads start and its slots get their pages at its first load, which is not to be measured. This much
// does for that, because loads were no faster after more of it; a whole tensor may be as much as a sample, which then
// takes twice its time from a slow disk.
constexpr std::uint64_t kWarmUpBytes = 8 * internal::kMiB;

void warm_up(Engine& engine, LoadRequest request) {
  auto& extents = request.files.front().extents;
  extents = first_part(extents, kWarmUpBytes);
  engine.load(request);
}

}  // namespace

EngineOptions options_of(const Setting& setting, Device device) {
  EngineOptions options;
  options.device = device;
  options.chunk_bytes = setting.chunk_bytes;
  options.queue_depth = setting.queue_depth;
  options.workers = setting.workers;
  options.staging_bytes = setting.staging_bytes;
  options.backend = setting.backend;
  if (setting.staging_bytes == 0) {
    // Staging is large enough never to limit the reads in flight.
    const std::uint64_t chunk_bytes = setting.chunk_bytes;
    options.staging_bytes = std::max(internal::usual_staging_bytes(device.kind),
                                     chunk_bytes * std::max(setting.queue_depth, internal::kMinSlots));
  }
  return options;
}

Subject::Subject(const std::filesystem::path& file, std::uint64_t size_bytes, Device to, bool verify)
    : device(to), checkpoint(file, size_bytes, false), memory(checkpoint.metadata().payload_bytes + 4096, "tensors") {
  touch(memory.bytes());
  target = memory.data();
  if (device.kind == Device::Kind::kCuda)
    target = device_memory.emplace(device.index, checkpoint.metadata().payload_bytes).data();
  from_disk = checkpoint.request(target, CachePolicy::kDirect);
  from_page_cache = checkpoint.request(target, CachePolicy::kBuffered);
  if (verify) {
    const Checksums* const checksums = &checkpoint.metadata().checksums.value();
    from_disk.files.front().checksums = from_page_cache.files.front().checksums = checksums;
  }
}

std::uint64_t Subject::sample_bytes(Work work) const {
  const auto loads = static_cast<std::uint64_t>(work == Work::kPageCache ? loads_from_page_cache : 1);
  return size_of(request(work)) * loads;
}

Sample sample(Subject& subject, const Setting& setting, Work work) {
  if (work == Work::kWrites) return sample_write(subject, setting);
  Engine engine(options_of(setting, subject.device));
  if (setting.workers == 0) subject.usual_workers = engine.options().workers;
  const LoadRequest& request = subject.request(work);
  warm_up(engine, request);
  const int loads = work == Work::kPageCache ? subject.loads_from_page_cache : 1;
  return measure([&] {
    for (int load = 0; load < loads; ++load) {
      const TransferStats stats = engine.load(request);
      subject.fallback_reason = stats.fallback_reason;
      subject.verified_bytes = stats.verified_bytes;
    }
  });
}

Sample sample_policy(Subject& subject, const Setting& setting, CachePolicy policy, Cached cached) {
  Engine engine(options_of(setting, subject.device));
  LoadRequest request = subject.from_disk;
  request.cache = policy;
  warm_up(engine, request);
  if (cached == Cached::kNothing) drop_from_page_cache(subject.checkpoint.path());
  return measure([&] { engine.load(request); });
}

void fit(Subject& subject, Work work, double seconds) {
  constexpr double kMostGrowth = 4;  // A short sample may be a burst that the disk does not keep up.
  LoadRequest& request = work == Work::kPageCache ? subject.from_page_cache : subject.from_disk;
  auto& extents = request.files.front().extents;
  const std::vector<Extent> all = extents;
  const std::uint64_t whole_bytes = size_of(request);
  // It grows from the least, because to read the whole file once would take much of the time on a slow disk.
  std::uint64_t bytes = std::min(kLeastSampleBytes, whole_bytes);
  double took_s = 0;
  for (;;) {
    extents = first_part(all, bytes);
    took_s = sample(subject, kUsual, work).seconds;
    const double growth = std::min(kMostGrowth, seconds / took_s);
    if (bytes == whole_bytes || growth < 2) break;
    bytes = std::min(whole_bytes, static_cast<std::uint64_t>(static_cast<double>(bytes) * growth));
  }
  if (work == Work::kPageCache)
    subject.loads_from_page_cache = static_cast<int>(std::clamp(std::ceil(seconds / 3 / took_s), 1.0, 1000.0));
}

void check_bytes(Subject& subject, const Setting& setting) {
  Engine engine(options_of(setting, subject.device));
  for (const CachePolicy route : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    std::ranges::fill(subject.memory.bytes(), std::byte{0xAB});  // Bytes of a load before must not count.
    if (subject.device_memory) subject.device_memory->clear();
    engine.load(subject.checkpoint.request(subject.target, route));
    if (subject.device_memory) subject.device_memory->copy_to(subject.memory.data());
    subject.checkpoint.check(subject.memory.data());
  }
}

double copies_gb_per_s(const Subject& subject) {
  const auto memory = subject.memory.bytes().first(subject.checkpoint.metadata().payload_bytes);
  const auto rate = [&](auto read) {
    const double seconds = measure([&] { read(subject.checkpoint.path(), memory); }).seconds;
    return static_cast<double>(memory.size()) / seconds / 1e9;
  };
  return std::max({rate(read_buffered), rate(copy_mapped), rate(read_buffered), rate(copy_mapped)});
}

}  // namespace flashpack::bench
