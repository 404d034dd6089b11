#include "engine/transfers.h"

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/ground/error.h"

namespace flashpack::internal {

namespace {

// The longest time until the driver notices that something is late.
constexpr std::chrono::nanoseconds kLookForLatePeriod = kLate / 5;

void note_fallbacks(const Part& part) {
  part.transfer->driver.note_fallback(part.planned->fallback_reason);
  part.transfer->driver.note_fallback(part.router().fallback_reason());
}

void report(const Part& part, std::uint32_t extent) {
  part.transfer->request.completion->landed(part.request.index, extent);
}

// Tells the completion of the extents that wait for no chunk: those of no bytes, or all, if the thread that opened the
// file has read it.
void report_at_once(const Part& part) {
  for (std::uint32_t extent = 0; extent < part.request.reported_extents; ++extent) {
    if (!part.planned || part.planned->landing->has_landed(extent)) report(part, extent);
  }
}

// Tells the completion, if it wants to know, of the extents that have landed with `chunk`, which has been delivered.
// Throws: Error, kCorrupt, if a stripe of them does not match.
void report_landed(const Part& part, const Chunk& chunk) {
  PlannedFile& planned = *part.planned;
  if (!planned.landing) return;
  const auto index = static_cast<std::uint32_t>(&chunk - planned.plan.chunks.data());
  const std::span<const std::uint32_t> landed = planned.landing->deliver(index);
  if (!landed.empty() && planned.sums) {
    const std::uint64_t begin_bytes = planned.plan.chunks[landed.front()].offset_bytes;
    compare_stripes(part.request, planned, begin_bytes, end_of(planned.plan.chunks[landed.back()]));
  }
  for (const std::uint32_t each : landed) {
    for (const Fragment& fragment : planned.plan.fragments_of(planned.plan.chunks[each])) {
      if (planned.landing->land(fragment)) report(part, fragment.extent);
    }
  }
}

// How the transfer has failed, also if only some of its parts have.
std::optional<Failure> failure_with_files(const TransferState& transfer) {
  const std::deque<Part>& parts = transfer.driver.parts;
  std::optional<Failure> failure = transfer.driver.failure;
  if (!transfer.request.continue_on_error) return failure;
  std::vector<FileFailure> files;
  for (const Part& part : parts) {
    if (part.failure) files.push_back({part.request.index, *part.failure});
  }
  if (!failure && !files.empty()) {
    failure = files.front().failure;
    if (parts.size() > 1) {
      failure->context =
          std::to_string(files.size()) + " of " + std::to_string(parts.size()) + " files failed: " + failure->context;
    }
  }
  if (failure) failure->files = std::move(files);
  return failure;
}

}  // namespace

Transfers::Transfers(Steps& steps, Schedule& schedule, DiskQueue& disk, Pool& pool, Copier* copier, OpenRules rules,
                     Tracer tracer)
    : steps_(steps),
      schedule_(schedule),
      disk_(disk),
      pool_(pool),
      copier_(copier),
      rules_(rules),
      tracer_(tracer),
      files_(pool, disk, rules),
      parts_(Mounts::of_process, tracer) {}

void Transfers::take_turn(Time now) {
  now_ = now;
  take_messages();
  expire();
  look_at_gates();
  look_for_late();
  while (Part* const part = parts_.find_next()) {
    if (!part->planned) part->planned = files_.join(*part);
    part->planned ? begin_issuing(*part) : open(*part);
  }
}

bool Transfers::end_if_finished() {
  const bool nothing_left =
      unfinished_ == 0 &&
      std::ranges::all_of(parts_.with_threads(), [](const Part* part) { return part->place.late; }) && inbox().end();
  assert(!nothing_left || steps_.idle());
  return nothing_left;
}

std::optional<std::chrono::nanoseconds> Transfers::patience() const {
  const bool something_may_be_late = !steps_.idle() || !parts_.with_threads().empty();
  const std::optional<std::chrono::nanoseconds> gates = gated_.patience(now_);
  if (!something_may_be_late && deadlines_.empty() && !gates) return std::nullopt;
  // A sleep of an hour at most, because now plus a far deadline would overflow in the wait.
  const auto longest = gates.value_or(something_may_be_late ? kLookForLatePeriod : std::chrono::hours(1));
  if (deadlines_.empty()) return longest;
  return std::clamp<std::chrono::nanoseconds>(deadlines_.begin()->first - std::chrono::steady_clock::now(), {},
                                              longest);
}

void Transfers::take_messages() {
  inbox().take(messages_);
  for (Inbox::Answer& answer : messages_.answers) on_answer(answer);
  messages_.answers.clear();
  for (const auto& transfer : messages_.started) admit(transfer);
  messages_.started.clear();
  std::shared_ptr<TransferState>& cancelled = messages_.cancelled;
  while (cancelled) {
    const std::shared_ptr<TransferState> transfer = std::exchange(cancelled, std::move(cancelled->next_cancelled));
    if (transfer->driver.self && !transfer->driver.failure) give_up(*transfer, Errc::kCancelled);
  }
}

void Transfers::admit(const std::shared_ptr<TransferState>& started) {
  TransferState& transfer = *started;
  transfer.driver.self = started;
  transfer.driver.number = next_number_++;
  transfer.driver.range = ranges_.begin(transfer);
  transfer.driver.parts_awaited = transfer.driver.parts.size();
  ++unfinished_;
  if (transfer.request.deadline) deadlines_.emplace(*transfer.request.deadline, &transfer);
  gated_.add(transfer, now_);
  for (Part& part : transfer.driver.parts) {
    part.transfer = &transfer;
    part.turn = next_turn_++;
  }
  if (transfer.cancel_requested)  // The transfer was cancelled before the driver had it.
    return give_up(transfer, Errc::kCancelled);
  for (Part& part : transfer.driver.parts) {
    if (part.awaited) admit(part);  // Otherwise a part before it has ended the transfer.
  }
  end_if_idle(transfer);
}

void Transfers::admit(Part& part) {
  if (!part.transfer->is_load()) return begin_issuing(part);
  if (!part.handover.result()) return parts_.enter(part, Part::State::kWaiting, now_);
  parts_.enter(part, Part::State::kDone, now_);
  stop_waiting_for(part);
}

void Transfers::expire() {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now_) {
    TransferState& transfer = *deadlines_.begin()->second;
    deadlines_.erase(deadlines_.begin());
    if (!transfer.driver.failure) give_up(transfer, Errc::kDeadlineExceeded);
  }
}

// Lets the waiting chunks of a transfer go on if its gates have opened or the transfer has failed. Transfers without a
// chunk under way are looked at, too, because they may find no slot while a gate is shut.
void Transfers::look_at_gates() {
  gated_.look(now_, [this](TransferState& transfer, std::error_code error) { give_up(transfer, error); });
  steps_.look_at_gates();
}

void Transfers::open(Part& part) {
  parts_.enter(part, Part::State::kOpening, now_);
  if (part.awaited) ++part.transfer->outstanding;
  files_.open(part);
}

void Transfers::close(Part& part) {
  parts_.enter(part, Part::State::kClosing, now_);
  if (part.awaited) ++part.transfer->outstanding;
  files_.close(part);
}

void Transfers::on_answer(Inbox::Answer& answer) {
  Part& part = *answer.part;
  assert(part.state() == Part::State::kOpening || part.state() == Part::State::kClosing);
  if (part.awaited) --part.transfer->outstanding;
  const bool ended = part.handover.result() != nullptr;
  parts_.enter(part, ended ? Part::State::kDone : Part::State::kAnswered, now_);
  ended ? stop_waiting_for(part) : on_opened(part, std::move(answer.opened));
}

void Transfers::on_opened(Part& part, Opened opened) {
  if (opened.planned && !opened.failure && !part.failure) {
    part.planned = std::move(opened.planned);
    return begin_issuing(part);
  }
  if (opened.planned) {
    if (!part.failure) fail(part, opened.failure->error());
    part.planned =
        std::move(opened.planned);  // After fail(): if that ends the transfer, end() must not take the file from here.
    return close(part);
  }
  if (no_descriptors(opened.failure->code) && !part.failure && !part.place.alone && !part.request.by_descriptor) {
    // Out of descriptors: the part waits until a file of this engine has been closed. The caller's descriptor is gone,
    // and the path may lead to another file.
    return parts_.enter(part, Part::State::kWaiting, now_);
  }
  part.handover.end({.failure = std::move(opened.failure)});
  parts_.enter(part, Part::State::kDone, now_);
  stop_waiting_for(part);
}

void Transfers::begin_issuing(Part& part) {
  parts_.enter(part, Part::State::kOpen, now_);
  report_at_once(part);
  part.chunks_open = static_cast<std::uint32_t>(part.plan().chunks.size());
  part.chunks_open == 0 ? on_all_back(part) : schedule_.add(part);
}

void Transfers::on_delivered(Part& part, const Chunk& chunk) {
  assert(part.chunks_open > 0);
  --part.chunks_open;
  try {
    report_landed(part, chunk);
  } catch (const Error& error) {
    return fail(part, error);
  }
  if (part.chunks_open == 0 && part.state() == Part::State::kOpen) on_all_back(part);
}

// Whether the end of the part needs no thread, because somebody else has the file, and nothing is left to be done with
// it that may wait. A small load through a FileHandle does not ask whether the file has changed; FileHandle says so.
bool Transfers::may_leave_open(const Part& part) const {
  const PlannedFile& planned = *part.planned;
  const bool nothing_left = planned.plan.total_bytes <= rules_.chunk_bytes && !planned.sums &&
                            part.transfer->request.after == AfterLoad::kKeep;
  if (!nothing_left || part.request.stays_open) return nothing_left;
  return !part.failure && planned.open.is_shared() && planned.file().answers_at_once() &&
         !planned.file().check_unchanged();
}

void Transfers::on_came_back(Part& part) {
  if (part.jobs == 0) on_all_back(part);
}

// To be called when no chunk of the part is left: all have been delivered, or it has failed and none is under way.
void Transfers::on_all_back(Part& part) {
  assert(!schedule_.has(part));
  note_fallbacks(part);
  const bool is_load = part.transfer->is_load();
  if (is_load && !may_leave_open(part)) return close(part);
  parts_.enter(part, Part::State::kDone, now_);
  if (is_load) leave(part);
  stop_waiting_for(part);
}

// The part does not use its file any more.
void Transfers::leave(Part& part) {
  if (auto last = part.planned->open.leave()) files_.close(std::move(last));
  if (part.transfer->is_load()) part.planned.reset();  // The FileWriter of a store reads the sums.
}

// The transfer does not wait for the part any more. Returns false if it did not wait.
bool Transfers::let_go(Part& part, bool thread_has_it) {
  if (!std::exchange(part.awaited, false)) return false;
  TransferState& transfer = *part.transfer;
  assert(transfer.driver.parts_awaited > 0);
  --transfer.driver.parts_awaited;
  if (thread_has_it) --transfer.outstanding;
  return true;
}

// The transfer takes over the result of the part, unless a thread still works on it, and lets the part go.
void Transfers::stop_waiting_for(Part& part, bool late) {
  if (!let_go(part, late)) return;
  TransferState& transfer = *part.transfer;
  if (const PartResult* const result = part.handover.result()) {
    transfer.add(*result);
    if (result->failure && !part.failure) return fail(part, result->failure->error());
    if (result->read_bytes > 0 && !part.failure) report_at_once(part);
  }
  end_if_idle(transfer);
}

void Transfers::look_for_late() {
  if (now_ - looked_for_late_ < kLookForLatePeriod) return;
  looked_for_late_ = now_;
  parts_.mark_late(now_);
  stop_waiting_for_late_threads();
  pool_.replace_late_threads();
  if (steps_.mark_late()) parts_.read_mounts();
}

// A transfer does not wait for a late thread that has only to close a file. It waits for no late thread of a part that
// has failed, except one that may write to the caller's memory.
void Transfers::stop_waiting_for_late_threads() {
  const std::vector<Part*>& with_threads = parts_.with_threads();
  for (std::size_t i = with_threads.size(); i-- > 0;) {
    Part& part = *with_threads[i];
    if (!part.place.late || !part.awaited) continue;
    const bool failed = part.failure.has_value();
    const bool opens = part.state() == Part::State::kOpening && failed && part.handover.claim_memory();
    const bool closes = part.handover.result() || (part.state() == Part::State::kClosing && failed);
    if (opens || closes) stop_waiting_for(part, true);
  }
}

// Ends a part that has failed and, unless the load continues, its transfer. After an error of CUDA no load continues,
// because every later copy would fail, too.
void Transfers::fail(Part& part, const Error& error) {
  const std::shared_ptr<TransferState> transfer = part.transfer->driver.self;
  part.failure.emplace(error);
  if (!transfer->request.continue_on_error || error.code().category() == cuda_category())
    return give_up(*transfer, error);
  give_up(part);
  end_if_idle(*transfer);
}

void Transfers::give_up(TransferState& transfer, std::error_code code) {
  std::deque<Part>& parts = transfer.driver.parts;
  for (Part& part : parts) {
    if (part.awaited && !part.failure) part.failure.emplace(file_error(code, transfer.verb(), part.request.path));
  }
  if (parts.size() < 2) return give_up(transfer, file_error(code, transfer.verb(), transfer.driver.path()));
  give_up(transfer, Error(code, std::string(transfer.verb()) + " " + transfer.driver.path().string() + " and " +
                                    std::to_string(parts.size() - 1) + " more"));
}

// Ends a transfer that has failed, with all of its parts that have not ended.
void Transfers::give_up(TransferState& transfer, const Error& error) {
  const std::shared_ptr<TransferState> keep = transfer.driver.self;
  transfer.driver.failure.emplace(error);
  for (Part& part : transfer.driver.parts) {
    if (!part.awaited) continue;
    if (!part.failure) part.failure = transfer.driver.failure;
    give_up(part);
  }
  end_if_idle(transfer);
}

// Ends a part that has failed: no chunk of it is issued any more, and operations in flight are cancelled and waited
// for. May be called again.
void Transfers::give_up(Part& part) {
  steps_.abandon_chunks_of(part);
  if (part.state() == Part::State::kOpen) schedule_.remove(part);
  if (part.state() == Part::State::kOpen && part.jobs == 0) return on_all_back(part);
  if (part.state() == Part::State::kWaiting) parts_.enter(part, Part::State::kDone, now_);
  if (part.state() == Part::State::kDone && part.given) files_.close(std::move(part.given));
  // If claim_memory() is false, the thread may be writing to the caller's memory, so the transfer waits for it.
  const bool opens = part.state() == Part::State::kOpening && (part.handover.result() || part.handover.claim_memory());
  const bool left_to_its_thread = opens || (part.state() == Part::State::kClosing && part.place.late);
  const bool nobody_has_it = part.state() == Part::State::kDone || part.state() == Part::State::kAnswered;
  if (left_to_its_thread || nobody_has_it) let_go(part, left_to_its_thread);
}

// Ends the transfer if there is nothing left to wait for.
void Transfers::end_if_idle(TransferState& transfer) {
  if (transfer.driver.self && transfer.driver.parts_awaited == 0) end(transfer);
}

void Transfers::tell_of_end(const TransferState& transfer, const std::optional<Failure>& failure) const {
  const std::string path = transfer.driver.path().native();
  tracer_.sink->event({.stage = TraceStage::kTransfer,
                       .engine = tracer_.engine,
                       .transfer = transfer.driver.number,
                       .path = path,
                       .size_bytes = transfer.done_bytes,
                       .begin = transfer.started,
                       .end = std::chrono::steady_clock::now(),
                       .depth = static_cast<std::uint32_t>(unfinished_),
                       .error = failure ? failure->code : std::error_code(),
                       .note = transfer.driver.stats.fallback_reason});
}

void Transfers::end(TransferState& transfer) {
  assert(transfer.driver.parts_awaited == 0);
  const std::shared_ptr<TransferState> keep = std::exchange(transfer.driver.self, nullptr);
  if (transfer.request.deadline) deadlines_.erase({*transfer.request.deadline, &transfer});
  gated_.remove(transfer);
  transfer.driver.gates.clear();  // A gate belongs to its device, which the caller's handle may outlive.
  for (Part& part : transfer.driver.parts) {
    if (part.planned) leave(part);
  }
  if (disk_.refuses()) transfer.driver.stats.backend = Backend::kWorkers;
  transfer.driver.note_fallback(disk_.fallback_reason());
  if (copier_) transfer.driver.note_fallback(copier_->fallback_reason());
  std::optional<Failure> failure = failure_with_files(transfer);
  if (tracer_) tell_of_end(transfer, failure);
  ranges_.end(transfer.driver.range);
  --unfinished_;
  transfer.finish(std::move(failure));
}

}  // namespace flashpack::internal
