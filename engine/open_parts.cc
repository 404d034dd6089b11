#include "engine/open_parts.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "engine/transfer_state.h"

namespace flashpack::internal {

namespace {

// A store's file is open from before its start until after its end, so it does not count.
bool is_open(const Part& part) {
  const bool has_file = part.state != Part::State::kWaiting && part.state != Part::State::kDone;
  return has_file && part.transfer->is_load();
}

}  // namespace

void OpenParts::enter(Part& part, Part::State state, Time now) {
  const bool was_open = is_open(part);
  if (tracer_) tell_of_end(part, now);
  leave_state(part);
  part.state = state;
  const bool ended = was_open && !is_open(part);
  open_ += is_open(part);
  open_ -= was_open;
  if (ended && state == Part::State::kWaiting) max_open_ = std::max<std::size_t>(1, open_ - held_up());
  if (ended && part.handover.result()) max_open_ = std::min(max_open_ + 1, kMaxOpen);
  enter_state(part, now);
}

// To be called before the part leaves its state.
void OpenParts::tell_of_end(const Part& part, Time now) const {
  const bool opens = part.state == Part::State::kOpening;
  if (!opens && part.state != Part::State::kClosing) return;
  const PartResult* const result = part.handover.result();
  const auto depth = std::ranges::count(with_threads_, part.state, &Part::state);
  tracer_.sink->event({.stage = opens ? TraceStage::kOpen : TraceStage::kClose,
                       .engine = tracer_.engine,
                       .transfer = part.transfer->driver.number,
                       .file = part.request.index,
                       .path = part.request.path.native(),
                       .size_bytes = opens && result ? result->read_bytes : 0,
                       .begin = part.since,
                       .end = now,
                       .depth = static_cast<std::uint32_t>(depth)});
}

void OpenParts::leave_state(Part& part) {
  switch (part.state) {
    case Part::State::kWaiting:
      waiting_.erase(part.turn);
      parked_.erase(part.turn);
      return;
    case Part::State::kOpening:
    case Part::State::kClosing:
      std::erase(with_threads_, &part);
      leave_places(part);
      if (std::exchange(part.late, false)) --late_;
      return;
    case Part::State::kOpen:
      if (!part.transfer->is_load()) return;
      part.file_system->remove_load();
      look_at_parked_ |= part.file_system->late() > 0;
      return;
    case Part::State::kAnswered:
    case Part::State::kDone:
      return;
  }
}

void OpenParts::enter_state(Part& part, Time now) {
  switch (part.state) {
    case Part::State::kWaiting:
      waiting_.emplace(part.turn, &part);
      return;
    case Part::State::kOpening:
      part.alone = open_ - 1 == held_up();
      [[fallthrough]];
    case Part::State::kClosing:
      part.since = now;
      with_threads_.push_back(&part);
      if (held_up() > 0) enter_places(part);
      return;
    case Part::State::kOpen:
      part.file_system = &file_systems_.try_emplace(part.file().identity().dev, totals_).first->second;
      if (part.places[0]) part.places[0]->file_system = part.places[1]->file_system = part.file_system;
      if (part.transfer->is_load()) part.file_system->add_load();
      return;
    case Part::State::kAnswered:
    case Part::State::kDone:
      return;
  }
}

Part* OpenParts::next() {
  look_at_parked_ |= std::exchange(totals_.answers_again, false);
  if (std::exchange(look_at_parked_, false)) waiting_.merge(parked_);
  while (!waiting_.empty() && open_ - held_up() < max_open_ && held_up() < kHeldUpLimit) {
    Part& part = *waiting_.begin()->second;
    if (held_up() == 0) return &part;
    if (!part.places[0]) part.places = places_of(part);
    if (places_have_shares(part)) return &part;
    parked_.insert(waiting_.extract(waiting_.begin()));
  }
  return nullptr;
}

// The directory of the part's path and the mount point above, found without asking a file system.
std::array<PlaceCounts*, 2> OpenParts::places_of(const Part& part) {
  std::error_code no_working_directory;
  const auto directory =
      std::filesystem::absolute(part.request.path, no_working_directory).lexically_normal().parent_path();
  const MountInfo* const mount = mounts_.find(directory);
  return {&places_[0][directory.native()], &places_[1][mount ? mount->point : std::string()]};
}

// Whether the parts at `place` take at most 1 / `shares` of what the parts elsewhere leave of kHeldUpLimit.
bool OpenParts::has_share(const PlaceCounts& place, unsigned shares) const {
  const std::size_t here = place.with_threads + place.held_up_loads();
  const std::size_t held_up_elsewhere = held_up() - (place.late + place.held_up_loads());
  return shares * here + held_up_elsewhere <= kHeldUpLimit;
}

bool OpenParts::places_have_shares(const Part& part) const {
  return has_share(*part.places[0], 3) && has_share(*part.places[1], 2);
}

void OpenParts::enter_places(Part& part) {
  if (!part.places[0]) part.places = places_of(part);
  if (std::exchange(part.in_places, true)) return;
  for (PlaceCounts* place : part.places) ++place->with_threads;
}

void OpenParts::leave_places(Part& part) {
  if (!std::exchange(part.in_places, false)) return;
  look_at_parked_ |= part.late || !places_have_shares(part);
  for (PlaceCounts* place : part.places) {
    --place->with_threads;
    if (part.late) --place->late;
  }
}

void OpenParts::mark_late(Time now) {
  bool found = false;
  for (Part* part : with_threads_) {
    if (part->late || now - part->since < kLate) continue;
    if (!std::exchange(found, true)) read_mounts();
    part->late = true;
    ++late_;
    enter_places(*part);
    for (PlaceCounts* place : part->places) ++place->late;
  }
}

}  // namespace flashpack::internal
