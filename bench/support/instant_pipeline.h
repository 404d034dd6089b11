/// The engine's pipeline without a disk, so that its own cost can be measured.
#pragma once

#include <memory>

#include "flashpack/engine.h"

namespace flashpack::bench {

/// A pipeline with the sizes of an engine's defaults and a driver thread, over queues that complete each operation at
/// once without moving a byte. Files are opened and planned as always, so they must be there. Thread safety: one
/// thread.
class InstantPipeline {
 public:
  InstantPipeline();
  ~InstantPipeline();

  /// Throws: Error.
  TransferStats load(LoadRequest request);

  /// User and system time of the driver thread.
  double driver_cpu_seconds() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flashpack::bench
