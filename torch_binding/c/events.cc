#include "torch_binding/c/events.h"

#include <algorithm>
#include <array>
#include <span>

#include "torch_binding/c/arguments.h"
#include "torch_binding/c/errors.h"

std::uint64_t flashpack_events::add(Started started) {
  const std::lock_guard lock(mutex_);
  started_.emplace(next_, std::move(started));
  return next_++;
}

void flashpack_events::remove(std::uint64_t number) {
  const std::lock_guard lock(mutex_);
  started_.erase(number);
}

std::size_t flashpack_events::take(flashpack_event* taken, std::size_t capacity) {
  owner_.require_current("events");
  std::array<flashpack::Event, 64> events;
  const std::lock_guard lock(mutex_);
  for (std::size_t count = 0;;) {
    const std::size_t wanted = std::min(events.size(), capacity - count);
    const std::size_t found = queue_.take(std::span(events).first(wanted));
    for (const flashpack::Event& event : std::span(events).first(found)) {
      const auto started = started_.find(event.tag);
      const bool done = event.kind == flashpack::Event::Kind::kDone;
      taken[count++] = {.tag = started->second.tag,
                        .extent = done ? 0 : started->second.indices[event.file][event.extent],
                        .kind = done ? FLASHPACK_EVENT_DONE : FLASHPACK_EVENT_LANDED,
                        .status = flashpack::c::status_of(event.error)};
      if (done) started_.erase(started);
    }
    if (found < wanted || count == capacity) return count;
  }
}

using namespace flashpack::c;

flashpack_status flashpack_events_create(flashpack_events** events, flashpack_error** error) {
  return guarded(error, [&] {
    auto*& result = result_of(events, "events");
    result = new flashpack_events;
  });
}

int32_t flashpack_events_fd(const flashpack_events* events) { return events ? events->fd() : -1; }

flashpack_status flashpack_events_take(flashpack_events* events, flashpack_event* taken, size_t capacity, size_t* count,
                                       flashpack_error** error) {
  return guarded(error, [&] {
    size_t& result = require(count, "count");
    result = 0;
    if (capacity > 0) require(taken, "taken");
    result = require(events, "events").take(taken, capacity);
  });
}

void flashpack_events_destroy(flashpack_events* events) {
  if (events && events->owner().is_current()) delete events;
}
