#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "flashpack/trace.h"

namespace flashpack::testing {

/// Keeps all events. Their texts are in paths() and notes().
class TraceRecorder final : public TraceSink {
 public:
  void event(const TraceEvent& event) noexcept override {
    const std::lock_guard lock(mutex_);
    events_.push_back(event);
    paths_.emplace_back(event.path);
    notes_.emplace_back(event.note);
    events_.back().path = events_.back().note = {};  // They are valid during the call only.
  }

  std::vector<TraceEvent> events() const {
    const std::lock_guard lock(mutex_);
    return events_;
  }
  std::vector<TraceEvent> of(TraceStage stage) const {
    std::vector<TraceEvent> found;
    for (const TraceEvent& event : events()) {
      if (event.stage == stage) found.push_back(event);
    }
    return found;
  }
  std::vector<std::string> paths() const {
    const std::lock_guard lock(mutex_);
    return paths_;
  }
  std::vector<std::string> notes() const {
    const std::lock_guard lock(mutex_);
    return notes_;
  }

 private:
  mutable std::mutex mutex_;  // Protects the rest.
  std::vector<TraceEvent> events_;
  std::vector<std::string> paths_;
  std::vector<std::string> notes_;
};

}  // namespace flashpack::testing
