/// Names the sink that an engine tells of its steps.
#pragma once

#include <cstdint>

#include "flashpack/trace.h"

namespace flashpack::internal {

struct Tracer {
  TraceSink* sink = nullptr;  ///< Null if nobody is. Borrowed.
  std::uint32_t engine = 0;   ///< TraceEvent::engine.

  explicit operator bool() const noexcept { return sink != nullptr; }
};

}  // namespace flashpack::internal
