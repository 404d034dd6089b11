#include "engine/pipeline.h"

#include <algorithm>
#include <utility>

namespace flashpack::internal {

namespace {

// A device does not wake the driver, so the driver looks this often for copies that have ended. It is a bound and not
// tuned: in that time a link of 50 GB/s moves 5 MB, which is little more than one of the slots, so that the others keep
// it busy.
constexpr std::chrono::microseconds kDevicePeriod{100};

}  // namespace

unsigned Pipeline::tag_limit(Limits limits) {
  // A populated chunk goes to the disk even if the queue depth is reached, so more jobs may be in flight.
  const unsigned wanted = limits.queue_depth + 3 * limits.worker_depth + limits.slots + Jobs::kStuckLimit;
  return std::min(wanted, DiskQueue::kMostTags);  // Further chunks wait until one ends.
}

Pipeline::Pipeline(Queues queues, Pool& pool, Copier* copier, std::vector<std::span<std::byte>> slots, Limits limits,
                   Tracer tracer)
    : queues_(queues),
      copier_(copier),
      schedule_(limits.queue_depth, limits.chunk_bytes),
      transfers_(steps_, schedule_, queues.disk, pool, copier,
                 {.chunk_bytes = limits.chunk_bytes, .at_once_bytes = limits.at_once_bytes}, tracer),
      steps_(transfers_, queues, copier, std::move(slots),
             {.tags = tag_limit(limits), .queue_depth = limits.queue_depth, .slots = limits.slots},
             {.depth = limits.worker_depth, .gathers = limits.gathers}, tracer) {}

bool Pipeline::run() {
  const bool refused = queues_.disk.refuses();
  while (true) {
    const auto now = std::chrono::steady_clock::now();
    steps_.set_time(now);
    transfers_.take_turn(now);
    if (transfers_.end_if_finished()) return true;
    const bool look_again = schedule_.start_chunks(steps_);
    steps_.reap(patience(look_again));
    if (queues_.disk.refuses() && !refused) return false;
  }
}

// How long the loop may sleep; empty is for ever.
std::optional<std::chrono::nanoseconds> Pipeline::patience(bool look_again) const {
  if (look_again) return std::chrono::nanoseconds(0);
  if (copier_ && !copier_->idle()) return kDevicePeriod;
  return transfers_.patience();
}

}  // namespace flashpack::internal
