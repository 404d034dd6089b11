/// Single things that the engine does, so that they can be timed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace flashpack::bench {

/// Returns the engine's question whether a range of the file is in the page cache: offset and size in bytes. Borrows
/// the descriptor.
std::function<bool(std::uint64_t, std::uint64_t)> cache_question(int buffered_fd);

/// A thread of the engine's pool.
class PoolThread {
 public:
  PoolThread();
  ~PoolThread();

  /// Gives it work, and waits until the work has been done.
  void wake();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flashpack::bench
