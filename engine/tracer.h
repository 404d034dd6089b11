/// Names the sink that an engine tells of its steps.
#pragma once

#include <cstdint>

#include "flashpack/trace.h"

namespace flashpack::internal {

/// Thread safety: as a plain struct. The sink is called by the driver thread alone.
struct Tracer {
  TraceSink* sink = nullptr;  ///< Null if no sink wants to hear of the steps. Borrowed.
  std::uint32_t engine = 0;   ///< TraceEvent::engine.

  explicit operator bool() const noexcept { return sink != nullptr; }
};

}  // namespace flashpack::internal
