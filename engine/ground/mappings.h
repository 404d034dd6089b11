/// Tells what the memory of this process is mapped to.
#pragma once

#include <cstddef>
#include <span>

#include "flashpack/unique_fd.h"

namespace flashpack::internal {

/// Asks the kernel about the mappings of this process. It keeps a descriptor from the first question on, which tells of
/// the process that opened it even in a forked child, and which a program may close that closes all descriptors.
/// Therefore each piece of work has an object of its own. Thread safety: as a standard container.
class Mappings {
 public:
  /// Whether all of `memory` is known to be mapped, readable and of no file or device, so that nobody who truncates a
  /// file can take bytes away. False also where the kernel does not tell.
  bool are_anonymous_and_readable(std::span<const std::byte> memory) noexcept;

 private:
  UniqueFd maps_;
};

}  // namespace flashpack::internal
