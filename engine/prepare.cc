#include "engine/prepare.h"

#include <fcntl.h>

#include <algorithm>
#include <bitset>
#include <cerrno>
#include <limits>
#include <span>
#include <system_error>
#include <utility>

#include "engine/ground/error.h"
#include "engine/open_part.h"

namespace flashpack::internal {

namespace {

// Asks the copier, and turns its failure into an Error.
template <typename Question>
auto ask_copier(Question question) {
  try {
    return question();
  } catch (const Error&) {
    throw;
  } catch (const std::system_error& error) {
    throw operation_error("start transfer", error);
  }
}

DeviceNumber device_of(const EngineFacts& engine, const void* memory) {
  return engine.copier ? ask_copier([&] { return engine.copier->device_of(memory); }) : kHost;
}

DeviceNumber devices_of(const EngineFacts& engine) { return engine.copier ? engine.copier->devices() : kHost; }

// Whether the caller has streams for more devices than there are.
template <class Request>
bool has_too_many_streams(const EngineFacts& engine, const Request& request) {
  return !request.more_streams.empty() && request.more_streams.size() >= devices_of(engine);
}

// The caller's stream for a device of the engine; null is the legacy default stream.
template <class Request>
CUstream_st* stream_of(const Request& request, DeviceNumber device) {
  if (device == 1) return request.stream;
  return device - 2u < request.more_streams.size() ? request.more_streams[device - 2u] : nullptr;
}

// The devices that have extents.
class DevicesInUse {
 public:
  void add(std::span<const Fragment> extents) {
    for (const Fragment& extent : extents) used_.set(extent.device);
  }
  bool has(DeviceNumber device) const { return used_[device]; }

 private:
  std::bitset<std::numeric_limits<DeviceNumber>::max() + 1> used_;
};

// Makes the gates that let copies wait for the work on the caller's streams: one for each device in use.
template <class Request>
std::vector<std::unique_ptr<Gate>> gates_for(const EngineFacts& engine, const Request& request,
                                             const DevicesInUse& used) {
  std::vector<std::unique_ptr<Gate>> gates;
  for (DeviceNumber device = 1; device <= devices_of(engine); ++device) {
    if (used.has(device))
      gates.push_back(ask_copier([&] { return engine.copier->gate(device, stream_of(request, device)); }));
  }
  return gates;
}

std::shared_ptr<TransferState> new_transfer(const EngineFacts& engine, TransferRequest request) {
  request.page_policy = engine.page_policy;
  auto state = std::make_shared<TransferState>(request);
  state->driver.stats.backend = engine.backend;
  state->driver.stats.requested_bytes = request.total_bytes;
  state->driver.stats.pinned = engine.copier && engine.copier->locked();
  state->driver.note_fallback(engine.fallback_reason);
  return state;
}

template <class Extents>
std::uint64_t total_bytes(const Extents& extents) {
  std::uint64_t total = 0;
  for (const auto& extent : extents) total += extent.size_bytes;
  return total;
}

// The path of the file, for messages.
const std::filesystem::path& path_of(const FileExtents& file) {
  return file.handle.valid() ? file.handle.path() : file.path;
}

void check_checksums(const FileExtents& file) {
  if (!file.checksums) return;
  if (file.checksums->crc32c.size() != Checksums::stripes_in(file.checksums->size_bytes))
    throw argument_error("load", path_of(file), "checksums that are not of its size");
}

void check_targets(std::span<const FileExtents> files) {
  struct Target {
    std::uintptr_t begin;
    std::uintptr_t end;
    const FileExtents* file;
  };
  std::vector<Target> targets;
  for (const FileExtents& file : files) {
    for (const Extent& extent : file.extents) {
      if (extent.size_bytes == 0) continue;
      const auto begin = reinterpret_cast<std::uintptr_t>(extent.target);
      if (!extent.target) throw argument_error("load", path_of(file), "extent without a target");
      if (extent.size_bytes > ~begin || extent.offset_bytes > ~extent.size_bytes)
        throw argument_error("load", path_of(file), "extent past the end of the address space");
      targets.push_back({begin, begin + extent.size_bytes, &file});
    }
  }
  std::ranges::sort(targets, {}, &Target::begin);
  const auto overlap =
      std::ranges::adjacent_find(targets, [](const Target& a, const Target& b) { return b.begin < a.end; });
  if (overlap == targets.end()) return;
  const std::string other =
      overlap->file == (overlap + 1)->file ? "" : " with those of " + path_of(*(overlap + 1)->file).string();
  throw argument_error("load", path_of(*overlap->file), "targets overlap in memory" + other);
}

// Copies only the checksums of stripes that the extents touch, because a load of a little of a large file should not
// copy them all.
WantedChecksums wanted_of(const Checksums& all, std::span<const Fragment> extents) {
  constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
  std::uint64_t begin = all.size_bytes;
  std::uint64_t end = 0;
  for (const Fragment& extent : extents) {
    begin = std::min(begin, extent.offset_bytes);
    end = std::max(end, std::min(end_of(extent), all.size_bytes));
  }
  WantedChecksums wanted{.payload_bytes = all.size_bytes};
  if (begin >= end) return wanted;
  wanted.first_stripe = begin / kStripeBytes;
  const auto stripes =
      std::span(all.crc32c).subspan(wanted.first_stripe, (end - 1) / kStripeBytes + 1 - wanted.first_stripe);
  wanted.crc32c.assign(stripes.begin(), stripes.end());
  return wanted;
}

void check_handle(const EngineFacts& engine, const FileExtents& file) {
  const FileUse open = FileUse::of(file.handle);
  if (open && open->engine != engine.number)
    throw argument_error("load", open->file.path(), "a handle of another engine");
}

// Adds the extents of the file to `wanted`. If `reported`, the completion is told of each of them.
void add_extents(const EngineFacts& engine, const FileExtents& file, bool reported, PartRequest& wanted) {
  for (std::uint32_t index = 0; index < file.extents.size(); ++index) {
    const Extent& extent = file.extents[index];
    if (extent.size_bytes == 0) continue;
    wanted.extents.push_back({extent.offset_bytes, extent.size_bytes, static_cast<std::byte*>(extent.target), index,
                              device_of(engine, extent.target), extent.priority});
  }
  if (reported) wanted.reported_extents = static_cast<std::uint32_t>(file.extents.size());
  if (file.checksums) wanted.checksums = wanted_of(*file.checksums, wanted.extents);
}

// Plans the part of a file that is open already or, if nothing else is to be loaded, reads it at once.
void begin(const EngineFacts& engine, TransferState& state, Part& part, const FileUse& open, bool is_only) {
  if (is_only && state.request.after == AfterLoad::kKeep && !state.request.deadline) {
    const Residency* const known = open->residency ? &*open->residency : nullptr;
    if (auto result = read_at_once(part.request, open->file, known, part.handover, engine.at_once_bytes))
      return part.handover.end(std::move(*result));
  }
  part.planned = std::make_unique<PlannedFile>(PlannedFile{.open = open});
  plan_load(part.request, engine.chunk_bytes, *part.planned);
}

template <class Body>
std::optional<Failure> failure_of(Body body) {
  try {
    body();
    return std::nullopt;
  } catch (const Error& error) {
    return Failure(error);
  }
}

// Adds the part of one file of a load. If something fails, the part's handover has the result.
void add_part(const EngineFacts& engine, TransferState& state, FileExtents file, const LoadRequest& load) {
  const FileUse open = FileUse::of(file.handle);
  PartRequest wanted{.path = path_of(file),
                     .index = static_cast<std::uint32_t>(state.driver.parts.size()),
                     .cache = load.cache,
                     .expected = file.expected,
                     .by_descriptor = file.fd >= 0,
                     .stays_open = static_cast<bool>(open)};
  const bool reported = load.report_extents && state.request.completion;
  std::optional<Failure> failure = failure_of([&] { add_extents(engine, file, reported, wanted); });
  Part& part = state.driver.parts.emplace_back(std::move(wanted));
  if (!failure) {
    failure = failure_of([&] {
      if (open) return begin(engine, state, part, open, load.files.size() == 1);
      if (file.fd >= 0) part.given = duplicate(file.fd, part.request.path);
    });
  }
  if (failure) part.handover.end({.failure = std::move(failure)});
}

}  // namespace

std::shared_ptr<TransferState> prepare_load(const EngineFacts& engine, LoadRequest request, Completion* completion) {
  for (const FileExtents& file : request.files) {
    check_checksums(file);
    check_handle(engine, file);
  }
  check_targets(request.files);
  if (has_too_many_streams(engine, request)) throw argument_error("load: more_streams than more_devices");
  std::uint64_t all_bytes = 0;
  for (const FileExtents& file : request.files) all_bytes += total_bytes(file.extents);
  auto state = new_transfer(engine, {.direction = Direction::kLoad,
                                     .deadline = request.deadline,
                                     .completion = completion,
                                     .after = request.after,
                                     .continue_on_error = request.continue_on_error,
                                     .total_bytes = all_bytes});
  for (FileExtents& file : request.files) add_part(engine, *state, std::move(file), request);
  DevicesInUse used;
  for (const Part& part : state->driver.parts) {
    if (engine.copier) used.add(part.request.extents);
  }
  state->driver.gates = gates_for(engine, request, used);
  return state;
}

std::vector<Fragment> extents_of(const EngineFacts& engine, const WriteRequest& request,
                                 const std::filesystem::path& path) {
  constexpr std::uint64_t kMaxFileBytes = std::numeric_limits<std::int64_t>::max();
  if (has_too_many_streams(engine, request)) throw argument_error("write", path, "more_streams than more_devices");
  std::vector<Fragment> extents;
  extents.reserve(request.extents.size());
  for (std::uint32_t index = 0; index < request.extents.size(); ++index) {
    const SourceExtent& extent = request.extents[index];
    if (extent.size_bytes == 0) continue;
    if (!extent.source) throw argument_error("write", path, "extent without a source");
    if (extent.size_bytes > kMaxFileBytes || extent.offset_bytes > kMaxFileBytes - extent.size_bytes)
      throw argument_error("write", path, "extent past 2^63");
    // A store only reads the bytes, but a fragment has one type of pointer for both directions.
    auto* const source = const_cast<std::byte*>(static_cast<const std::byte*>(extent.source));
    extents.push_back({extent.offset_bytes, extent.size_bytes, source, index, device_of(engine, source)});
  }
  std::sort(extents.begin(), extents.end(),
            [](const Fragment& a, const Fragment& b) { return a.offset_bytes < b.offset_bytes; });
  return extents;
}

std::shared_ptr<TransferState> prepare_store(const EngineFacts& engine, const StoreTarget& target,
                                             const WriteRequest& request, std::vector<Fragment> extents,
                                             Completion* completion) {
  auto state = new_transfer(engine, {.direction = Direction::kStore,
                                     .deadline = request.deadline,
                                     .completion = completion,
                                     .total_bytes = total_bytes(extents)});
  DevicesInUse used;
  if (engine.copier) used.add(extents);
  state->driver.gates = gates_for(engine, request, used);
  auto planned = std::make_unique<PlannedFile>(PlannedFile{.open = target.open});
  const File& file = planned->file();
  if (file.direct_fd() < 0) planned->fallback_reason = "direct I/O: " + file.direct_error().message();
  if (target.checksums && !extents.empty()) planned->sums.emplace(extents.front().offset_bytes, end_of(extents.back()));
  planned->plan = Plan::of_store(std::move(extents), engine.chunk_bytes, file.alignment());
  planned->router = Router(planned->plan, file);
  state->driver.parts.emplace_back(PartRequest{.path = target.path}).planned = std::move(planned);
  return state;
}

}  // namespace flashpack::internal
