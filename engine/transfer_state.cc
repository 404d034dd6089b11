#include "engine/transfer_state.h"

#include <algorithm>
#include <cassert>
#include <span>
#include <utility>

#include "engine/ground/reasons.h"

namespace flashpack::internal {

void TransferEnd::reach(std::optional<Failure> failure, TransferStats stats) {
  const std::lock_guard lock(mutex_);
  failure_ = std::move(failure);
  stats_ = std::move(stats);
  reached_ = true;
  reached_by_ = std::this_thread::get_id();
}

void TransferEnd::publish() {
  {
    const std::lock_guard lock(mutex_);
    published_ = true;
  }
  published_changed_.notify_all();
}

bool TransferEnd::reached() const {
  const std::lock_guard lock(mutex_);
  return reached_;
}

bool TransferEnd::is_visible([[maybe_unused]] const Lock& lock) const {
  assert(lock.owns_lock());
  return published_ || (reached_ && std::this_thread::get_id() == reached_by_);
}

bool TransferEnd::is_visible() const { return is_visible(Lock(mutex_)); }

void TransferEnd::wait() const {
  Lock lock(mutex_);
  published_changed_.wait(lock, [&] { return is_visible(lock); });
}

bool TransferEnd::wait_for(std::chrono::nanoseconds duration) const {
  Lock lock(mutex_);
  // The sum of now and a very long duration would overflow.
  const auto bounded = std::min<std::chrono::nanoseconds>(duration, std::chrono::hours(24 * 365));
  return published_changed_.wait_for(lock, bounded, [&] { return is_visible(lock); });
}

const Failure* TransferEnd::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_ ? &*failure_ : nullptr;
}

TransferStats TransferEnd::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

std::filesystem::path TransferState::path() const {
  return driver.parts.empty() ? std::filesystem::path() : driver.parts.front().request.path;
}

void TransferState::add(const PartResult& result) {
  driver.stats.verified_bytes += result.verified_bytes;
  driver.stats.buffered_bytes += result.read_bytes;
  driver.stats.operations += result.read_bytes > 0;
  note_fallback(result.fallback_reason);
  done_bytes += result.read_bytes;
}

const PartResult* TransferState::result_if_read() const {
  if (driver.parts.size() != 1) return nullptr;
  const PartResult* const result = driver.parts.front().handover.result();
  return result && !result->failure ? result : nullptr;
}

const StripeSums* TransferState::sums() const {
  const std::optional<StripeSums>& sums = driver.parts.front().planned->sums;
  return sums ? &*sums : nullptr;
}

std::optional<Failure> TransferState::failure() const {
  std::optional<Failure> failure = driver.failure;
  if (!request.continue_on_error) return failure;
  std::vector<FileFailure> files;
  for (const Part& part : driver.parts) {
    if (part.failure) files.push_back({part.request.index, *part.failure});
  }
  if (!failure && !files.empty()) {
    failure = files.front().failure;
    if (driver.parts.size() > 1)
      failure->context = std::to_string(files.size()) + " of " + std::to_string(driver.parts.size()) +
                         " files failed: " + failure->context;
  }
  if (failure) failure->files = std::move(files);
  return failure;
}

void TransferState::finish(std::optional<Failure> result) {
  driver.stats.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  {
    const std::lock_guard lock(inbox_mutex_);
    inbox_ = nullptr;
  }
  end.reach(std::move(result), driver.stats);
  if (request.completion) {
    Transfer transfer = handle(shared_from_this());
    request.completion->done(transfer);
  }
  end.publish();
}

void TransferState::look_at_gates(std::error_code& error) {
  std::erase_if(driver.gates, [&](const auto& gate) { return gate->is_open(error); });
}

void TransferState::note_fallback(std::string_view reason) { add_reason(driver.stats.fallback_reason, reason); }

void TransferState::report_at_once(const Part& part) const {
  for (std::uint32_t extent = 0; extent < part.request.reported_extents; ++extent) {
    if (!part.planned || part.planned->landing->has_landed(extent))
      request.completion->landed(part.request.index, extent);
  }
}

void TransferState::report_landed(Part& part, const Chunk& chunk) const {
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
      if (planned.landing->land(fragment)) request.completion->landed(part.request.index, fragment.extent);
    }
  }
}

}  // namespace flashpack::internal
