#include "engine/jobs.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "engine/ground/rounding.h"
#include "engine/ground/target_pages.h"
#include "engine/ground/units.h"
#include "engine/transfer_state.h"

namespace flashpack::internal {

namespace {

// The trace stage of the job's step; empty if it is not traced.
std::optional<TraceStage> stage_of(const Job& job) {
  switch (job.step) {
    case Step::kRead:
      return TraceStage::kRead;
    case Step::kWrite:
      return TraceStage::kWrite;
    case Step::kReadIfCached:
    case Step::kReadCached:
      return TraceStage::kReadCached;
    case Step::kWriteCached:
      return TraceStage::kWriteCached;
    case Step::kPopulate:
    case Step::kPopulateSlot:
      return job.step == job.way.counts_in ? TraceStage::kChecksum : TraceStage::kPopulate;
    case Step::kScatter:
    case Step::kGather:
      return TraceStage::kCopy;
    case Step::kCount:
      return TraceStage::kChecksum;
    case Step::kWait:
      return TraceStage::kWait;
    case Step::kFree:
    case Step::kDeliver:
    case Step::kAbandoned:
      break;
  }
  return std::nullopt;
}

// Whether a chunk that needs no slot is moved without one. The disks of virtual machines read so much slower to small
// pages, populated or fresh, that a read to a slot, which has huge ones, and a copy take less time, from 64 KiB to 4
// MiB at least (engine_bench, cost/read_into_*). Such machines are those where huge pages cost too much. Small loads
// stay in place, because a program that makes many of them, to take little memory, would have that of the slots as
// well. The groups of a stream from Python must not (bench/README.md); otherwise the limit is not tuned.
bool stays_in_place(const Part& part, const Chunk& chunk) {
  constexpr std::uint64_t kLeastBytes = 32 * kMiB;
  PagePolicy* const policy = part.transfer->request.page_policy;
  if (!part.transfer->is_load() || !policy || part.transfer->request.total_bytes < kLeastBytes) return true;
  return !policy->has_small_pages(part.plan().fragments_of(chunk).front().memory);
}

}  // namespace

Way way_of(const Part& part, const Chunk& chunk, ChunkTraits::Route route) {
  using Memory = ChunkTraits::Memory;
  using Route = ChunkTraits::Route;
  assert(chunk.device == kHost || !chunk.in_place);
  const bool past_cache = route == Route::kDirect || route == Route::kRefused;
  const Memory on_host =
      past_cache && !(chunk.in_place && stays_in_place(part, chunk)) ? Memory::kSlot : Memory::kInPlace;
  return way_of({.direction = part.transfer->request.direction,
                 .route = route,
                 .memory = chunk.device == kHost ? on_host : Memory::kDevice,
                 .counted = part.planned->sums.has_value()});
}

DiskRequest Job::disk_request() const {
  assert(done_bytes < file_bytes.size_bytes && (step == Step::kRead || step == Step::kWrite));
  const File& file = part->file();
  return {.op = step == Step::kRead ? DiskRequest::Op::kRead : DiskRequest::Op::kWrite,
          .fd = file.direct_fd(),
          .offset_bytes = file_bytes.offset_bytes + done_bytes,
          .memory = {file_bytes.memory + done_bytes, file_bytes.size_bytes - done_bytes},
          .may_block = file.may_block(),
          .slot = slot,
          .transfer = part->transfer};
}

ByteWork Job::byte_work() const {
  const bool counts = step == way.counts_in;
  ByteWork work{.view = view,
                .fragments = fragments(),
                .sums = counts ? &*part->planned->sums : nullptr,
                .transfer = part->transfer,
                .page_policy = transfer().request.page_policy};
  switch (step) {
    case Step::kReadIfCached:
    case Step::kReadCached:
    case Step::kWriteCached:
      work.op = step == Step::kWriteCached ? ByteWork::Op::kToCache : ByteWork::Op::kFromCache;
      work.fd = part->file().buffered_fd();
      if (way.view != View::kFragments) work.fragments = {&file_bytes, 1};
      work.page_cache = {.only = step == Step::kReadIfCached, .drop = transfer().request.after == AfterLoad::kDrop};
      return work;
    case Step::kPopulateSlot:
    case Step::kPopulate:  // Counting reads the bytes, and so takes their page faults, too.
      work.op = counts ? ByteWork::Op::kChecksum : ByteWork::Op::kPopulate;
      work.touch = transfer().is_load() ? ByteWork::Touch::kForWriting : ByteWork::Touch::kForReading;
      return work;
    case Step::kCount:
      work.op = ByteWork::Op::kChecksum;
      return work;
    case Step::kScatter:
    case Step::kGather:
      assert(has_slot(way.view));
      work.op = step == Step::kScatter ? ByteWork::Op::kScatter : ByteWork::Op::kGather;
      return work;
    default:
      assert(false && "a step in which nobody touches the bytes");
      return work;
  }
}

Jobs::Jobs(Limits limits, std::vector<std::span<std::byte>> slots, Tracer tracer)
    : limits_(limits), tracer_(tracer), slots_(std::move(slots)), jobs_(limits.tags), used_bytes_(slots_.size()) {
  assert(limits.slots > 0 && limits.slots <= slots_.size());
  in_[static_cast<std::size_t>(Step::kFree)] = limits.tags;
  for (unsigned tag = limits.tags; tag-- > 0;) free_.push_back(tag);
  for (int slot = static_cast<int>(slots_.size()); slot-- > 0;) free_slots_.push_back(slot);
}

bool Jobs::idle() const {
  const bool idle = free_.size() == jobs_.size();
  assert(!idle || (free_slots_.size() == slots_.size() && stuck_ == 0 && stuck_slots_ == 0));
  return idle;
}

// Returns whether `part` gets no more tags, or no more slots, of which stuck jobs hold `used`. That is so if its file
// has many stuck jobs and more than `of_files` are used, or its file system has many and more than `of_file_systems`
// are used.
bool Jobs::has_enough_stuck(const Part& part, std::size_t used, std::size_t of_files,
                            std::size_t of_file_systems) const {
  const std::uint32_t many = std::min(limits_.queue_depth, limits_.slots);
  const bool has_many = part.open_file().stuck() >= many || part.transfer->driver.stuck_copies >= many;
  return (has_many && used > of_files) || (part.file_system().stuck() >= many && used > of_file_systems);
}

bool Jobs::may_have_more(const Part& part) const {
  return !has_enough_stuck(part, stuck_, kStuckLimit / 2, kStuckLimit * 3 / 4);
}

// Whether `file_system` has its share of slots where there are no spare ones: it leaves a quarter of those that it
// finds to others, which then go on if it does not answer. With fewer than four slots there is no such rule, because
// the disk would idle during each copy.
bool Jobs::has_its_share_of_slots(const FileSystem& file_system) const {
  constexpr std::size_t kFew = 4;
  return slots_.size() == limits_.slots && slots_.size() >= kFew && file_system.slots() > 0 &&
         file_system.slots() + 1 > 3 * (free_slots_.size() - 1);
}

std::optional<int> Jobs::take_slot(const Part& part) {
  // A chunk behind a gate may wait long, so such chunks leave half of the slots to others.
  const std::size_t kept = part.transfer->driver.has_shut_gate() ? limits_.slots / 2 : 0;
  const std::size_t used = slots_.size() - free_slots_.size() - stuck_slots_;
  if (free_slots_.empty() || used + kept >= limits_.slots) return std::nullopt;
  const std::size_t spare = slots_.size() - limits_.slots;
  // How many slots would be stuck if every operation of this part got stuck now.
  const std::size_t soon_stuck = stuck_slots_ + std::min(limits_.queue_depth, limits_.slots);
  if (has_enough_stuck(part, soon_stuck, spare, spare + limits_.slots / 2)) return std::nullopt;
  if (has_its_share_of_slots(part.file_system())) return std::nullopt;
  const int slot = free_slots_.back();
  free_slots_.pop_back();
  return slot;
}

bool Jobs::next_slot_is_fresh(const Chunk& chunk) const {
  return chunk.size_bytes >= kHugePageBytes && !free_slots_.empty() &&
         used_bytes_[static_cast<std::size_t>(free_slots_.back())] < chunk.size_bytes;
}

std::optional<unsigned> Jobs::open(Part& part, const Chunk& chunk, const Way& way) {
  assert(part.planned && part.place.file_system);
  if (none_free()) return std::nullopt;
  int slot = -1;
  if (has_slot(way.view)) {
    const std::optional<int> taken = take_slot(part);
    if (!taken) return std::nullopt;
    slot = *taken;
  }
  const unsigned tag = free_.back();
  free_.pop_back();
  Job& job = jobs_[tag];
  assert(job.step == Step::kFree);
  job = Job{.part = &part, .chunk = &chunk, .way = way, .slot = slot};
  set_view(job);
  ++part.jobs;
  ++part.transfer->outstanding;
  return tag;
}

void Jobs::reroute(Job& job, const Way& way) {
  job.way = way;
  job.next = 0;
  if (job.slot >= 0 && !has_slot(way.view)) {
    if (job.stuck) clear_stuck(job);
    give_back_slot(job);
  }
  set_view(job);
}

void Jobs::give_back_slot(Job& job) {
  if (is_of_file(job.step)) job.part->file_system().remove_slot();
  free_slots_.push_back(std::exchange(job.slot, -1));
}

void Jobs::set_view(Job& job) const {
  const Chunk& chunk = *job.chunk;
  const std::uint32_t block_bytes = job.way.view == View::kBlocks ? job.part->file().alignment().block_bytes : 1;
  const std::uint64_t begin = round_down(chunk.offset_bytes, block_bytes);
  const std::uint64_t end = round_up(end_of(chunk), block_bytes);
  job.view = {};
  if (has_slot(job.way.view)) {
    assert(job.slot >= 0);
    const std::span<std::byte> slot = slots_[static_cast<std::size_t>(job.slot)];
    assert(end - begin <= slot.size());
    job.view = {begin, slot.first(end - begin)};
  } else if (job.way.view == View::kInPlace) {
    job.view = {begin, {job.fragments().front().memory, end - begin}};
  }
  job.file_bytes = {begin, end - begin, job.view.bytes.data()};
}

void Jobs::enter(Job& job, Step step, Time now) {
  if (tracer_) tell_of_end(job, step, now);
  if (job.stuck) clear_stuck(job);
  assert(in(job.step) > 0);
  if (job.slot >= 0) {
    if (step == Step::kRead) {
      std::uint64_t& used_bytes = used_bytes_[static_cast<std::size_t>(job.slot)];
      used_bytes = std::max<std::uint64_t>(used_bytes, job.view.bytes.size());
    }
    FileSystem& file_system = job.part->file_system();
    if (is_of_file(job.step)) file_system.remove_slot();
    if (is_of_file(step)) file_system.add_slot();
  }
  --in_[static_cast<std::size_t>(job.step)];
  ++in_[static_cast<std::size_t>(job.step = step)];
  job.since = now;
  job.begun_bytes = job.done_bytes;
  if (step == Step::kAbandoned) set_stuck(job);
}

bool Jobs::mark_late(Time now) {
  bool found = false;
  for (Job& job : jobs_) {
    if (!job.way.may_be_late(job.step) || job.late || now - job.since < kLate) continue;
    if (!job.stuck) set_stuck(job);
    job.late = true;
    if (is_of_file(job.step)) job.part->file_system().add_late();
    found = true;
  }
  return found;
}

void Jobs::set_stuck(Job& job) {
  assert(!job.stuck && job.way.may_be_late(job.step) && in(job.step) > 0);
  job.stuck = true;
  --in_[static_cast<std::size_t>(job.step)];
  if (is_of_file(job.step)) {
    job.part->open_file().add_stuck();
    job.part->file_system().add_stuck();
  } else {
    ++job.transfer().driver.stuck_copies;
  }
  ++stuck_;
  if (job.slot >= 0) ++stuck_slots_;
}

void Jobs::clear_stuck(Job& job) {
  assert(job.stuck && stuck_ > 0);
  job.stuck = false;
  ++in_[static_cast<std::size_t>(job.step)];
  const bool was_late = std::exchange(job.late, false);
  if (is_of_file(job.step)) {
    FileSystem& file_system = job.part->file_system();
    job.part->open_file().remove_stuck();
    file_system.remove_stuck();
    if (was_late) file_system.remove_late();
  } else {
    --job.transfer().driver.stuck_copies;
  }
  --stuck_;
  if (job.slot >= 0) --stuck_slots_;
}

// To be called before `job` begins `next`.
void Jobs::tell_of_end(const Job& job, Step next, Time now) const {
  const std::optional<TraceStage> stage = stage_of(job);
  if (!stage || (*stage == TraceStage::kWait && job.since == now)) return;
  const bool direct = job.step == Step::kRead || job.step == Step::kWrite;
  const bool failed = next == Step::kFree || next == Step::kAbandoned;
  const std::uint64_t of_worker = failed ? 0 : job.part->plan().wanted_bytes(*job.chunk);
  const auto depth = std::ranges::count_if(jobs_, [&](const Job& other) { return stage_of(other) == stage; });
  tracer_.sink->event({.stage = *stage,
                       .engine = tracer_.engine,
                       .transfer = job.transfer().driver.number,
                       .file = job.part->request.index,
                       .path = job.part->request.path.native(),
                       .device = job.chunk->device,
                       .lane = static_cast<std::uint32_t>(&job - jobs_.data()),
                       .offset_bytes = direct ? job.file_bytes.offset_bytes + job.begun_bytes : job.chunk->offset_bytes,
                       .size_bytes = direct ? job.done_bytes - job.begun_bytes : of_worker,
                       .begin = job.since,
                       .end = now,
                       .depth = static_cast<std::uint32_t>(depth)});
}

void Jobs::close(unsigned tag, Time now) {
  Job& job = jobs_[tag];
  Part& part = *job.part;
  assert(part.jobs > 0 && part.transfer->outstanding > 0);
  enter(job, Step::kFree, now);
  if (job.slot >= 0) give_back_slot(job);
  job = Job{};
  free_.push_back(tag);
  --part.transfer->outstanding;
  --part.jobs;
}

}  // namespace flashpack::internal
