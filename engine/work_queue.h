/// The interface through which the pipeline has work done that needs a CPU.
#pragma once

#include "engine/byte_work.h"
#include "engine/io_queue.h"

namespace flashpack::internal {

/// Thread safety: as Queue.
class WorkQueue : public Queue {
 public:
  using Request = ByteWork;
  /// As DiskQueue::push().
  virtual void push(unsigned tag, const ByteWork& work) = 0;
};

}  // namespace flashpack::internal
