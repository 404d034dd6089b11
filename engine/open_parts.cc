#include "engine/open_parts.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "engine/transfer_state.h"

namespace flashpack::internal {

namespace {

// A store's file is open from before its start until after its end, so it does not count.
bool is_open(const Part& part) {
  const bool has_file = part.state() != Part::State::kWaiting && part.state() != Part::State::kDone;
  return has_file && part.transfer->is_load();
}

}  // namespace

void OpenParts::enter(Part& part, Part::State state, Time now) {
  const bool was_open = is_open(part);
  if (tracer_) tell_of_end(part, now);
  leave_state(part);
  part.place.state = state;
  const bool ended = was_open && !is_open(part);
  open_ += is_open(part);
  open_ -= was_open;
  if (ended && state == Part::State::kWaiting) max_open_ = std::max<std::size_t>(1, open_ - held_up());
  if (ended && part.handover.result()) max_open_ = std::min(max_open_ + 1, kMaxOpen);
  enter_state(part, now);
}

// To be called before the part leaves its state.
void OpenParts::tell_of_end(const Part& part, Time now) const {
  const bool opens = part.state() == Part::State::kOpening;
  if (!opens && part.state() != Part::State::kClosing) return;
  const PartResult* const result = part.handover.result();
  const auto depth = std::ranges::count(with_threads_, part.state(), &Part::state);
  tracer_.sink->event({.stage = opens ? TraceStage::kOpen : TraceStage::kClose,
                       .engine = tracer_.engine,
                       .transfer = part.transfer->driver.number,
                       .file = part.request.index,
                       .path = part.request.path.native(),
                       .size_bytes = opens && result ? result->read_bytes : 0,
                       .begin = part.place.since,
                       .end = now,
                       .depth = static_cast<std::uint32_t>(depth)});
}

void OpenParts::leave_state(Part& part) {
  switch (part.state()) {
    case Part::State::kWaiting:
      waiting_.erase(part.turn);
      parked_.erase(part.turn);
      return;
    case Part::State::kOpening:
    case Part::State::kClosing:
      std::erase(with_threads_, &part);
      leave_prefixes(part);
      if (std::exchange(part.place.late, false)) --late_;
      return;
    case Part::State::kOpen:
      if (!part.transfer->is_load()) return;
      part.file_system().remove_load();
      look_at_parked_ |= part.file_system().late() > 0;
      return;
    case Part::State::kAnswered:
    case Part::State::kDone:
      return;
  }
}

void OpenParts::enter_state(Part& part, Time now) {
  switch (part.state()) {
    case Part::State::kWaiting:
      waiting_.emplace(part.turn, &part);
      return;
    case Part::State::kOpening:
      part.place.alone = open_ - 1 == held_up();
      [[fallthrough]];
    case Part::State::kClosing:
      part.place.since = now;
      with_threads_.push_back(&part);
      if (held_up() > 0) enter_prefixes(part);
      return;
    case Part::State::kOpen:
      point(part.place.file_system, &file_systems_.try_emplace(part.file().identity().dev, totals_).first->second);
      for (PrefixCounts* const prefix : part.place.prefixes) {
        if (prefix) point(prefix->file_system, part.place.file_system);
      }
      if (part.transfer->is_load()) part.file_system().add_load();
      return;
    case Part::State::kDone:
      return forget_places_of(part);
    case Part::State::kAnswered:
      return;
  }
}

Part* OpenParts::find_next() {
  look_at_parked_ |= std::exchange(totals_.answers_again, false);
  if (std::exchange(look_at_parked_, false)) waiting_.merge(parked_);
  while (!waiting_.empty() && open_ - held_up() < max_open_ && held_up() < kHeldUpLimit) {
    Part& part = *waiting_.begin()->second;
    if (held_up() == 0) return &part;
    find_prefixes(part);
    if (prefixes_have_shares(part)) return &part;
    parked_.insert(waiting_.extract(waiting_.begin()));
  }
  return nullptr;
}

// Finds the directory of the part's path and the mount point above, without asking a file system.
void OpenParts::find_prefixes(Part& part) {
  if (part.place.prefixes[0]) return;
  std::error_code no_working_directory;
  const auto directory =
      std::filesystem::absolute(part.request.path, no_working_directory).lexically_normal().parent_path();
  const MountInfo* const mount = mounts_.find(directory);
  const std::array paths{directory.native(), mount ? mount->point : std::string()};
  for (std::size_t i = 0; i < paths.size(); ++i) {
    const auto found = prefixes_[i].try_emplace(paths[i]).first;
    found->second.path = &found->first;
    ++found->second.parts;
    part.place.prefixes[i] = &found->second;
  }
}

// Sets a pointer of a part or a prefix. A file system to which none is left is forgotten.
void OpenParts::point(FileSystem*& pointer, FileSystem* file_system) {
  if (file_system) file_system->add_user();
  FileSystem* const before = std::exchange(pointer, file_system);
  if (!before || !before->remove_user()) return;
  assert(before->loads() == 0 && before->late() == 0 && before->stuck() == 0);
  std::erase_if(file_systems_, [before](const auto& each) { return &each.second == before; });
}

void OpenParts::forget_places_of(Part& part) {
  for (std::size_t i = 0; i < prefixes_.size(); ++i) {
    PrefixCounts* const prefix = std::exchange(part.place.prefixes[i], nullptr);
    if (!prefix || --prefix->parts > 0) continue;
    point(prefix->file_system, nullptr);
    prefixes_[i].erase(prefixes_[i].find(*prefix->path));
  }
  point(part.place.file_system, nullptr);
}

// Whether the parts at `prefix` have at most their share: one of `shares` equal shares of kHeldUpLimit less those that
// are held up elsewhere. With 2 shares, a limit of 256 and 56 held up elsewhere, that is 100.
bool OpenParts::has_share(const PrefixCounts& prefix, unsigned shares) const {
  const std::size_t here = prefix.with_threads + prefix.held_up_loads();
  const std::size_t held_up_elsewhere = held_up() - (prefix.late + prefix.held_up_loads());
  return shares * here + held_up_elsewhere <= kHeldUpLimit;
}

bool OpenParts::prefixes_have_shares(const Part& part) const {
  return has_share(*part.place.prefixes[0], 3) && has_share(*part.place.prefixes[1], 2);
}

void OpenParts::enter_prefixes(Part& part) {
  find_prefixes(part);
  if (std::exchange(part.place.in_prefixes, true)) return;
  for (PrefixCounts* prefix : part.place.prefixes) ++prefix->with_threads;
}

void OpenParts::leave_prefixes(Part& part) {
  if (!std::exchange(part.place.in_prefixes, false)) return;
  look_at_parked_ |= part.place.late || !prefixes_have_shares(part);
  for (PrefixCounts* prefix : part.place.prefixes) {
    --prefix->with_threads;
    if (part.place.late) --prefix->late;
  }
}

void OpenParts::mark_late(Time now) {
  bool found = false;
  for (Part* part : with_threads_) {
    if (part->place.late || now - part->place.since < kLate) continue;
    if (!std::exchange(found, true)) read_mounts();
    part->place.late = true;
    ++late_;
    enter_prefixes(*part);
    for (PrefixCounts* prefix : part->place.prefixes) ++prefix->late;
  }
}

}  // namespace flashpack::internal
