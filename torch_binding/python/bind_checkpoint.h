/// Binds checkpoints, and plans of what to read from them, to Python.
///
/// Thread safety: the calling thread has the GIL.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <string_view>
#include <tuple>
#include <vector>

#include "flashpack/checkpoint.h"
#include "flashpack/checksums.h"
#include "flashpack/engine.h"

namespace flashpack {

/// Index of the file, offset in it in bytes, size in bytes, address in memory.
using ReadTuple = std::tuple<std::size_t, std::uint64_t, std::uint64_t, std::uintptr_t>;

/// A checkpoint that Python can close while other threads read it: their transfers keep it.
class PyCheckpoint {
 public:
  explicit PyCheckpoint(Checkpoint opened) : opened_(std::make_shared<const Checkpoint>(std::move(opened))) {}

  /// Throws: ValueError if it has been closed.
  std::shared_ptr<const Checkpoint> get() const;
  void close() { opened_.reset(); }

 private:
  std::shared_ptr<const Checkpoint> opened_;  // Shared with the loads, which may end after close().
};

/// Throws: Error (kInvalidArgument) for an unknown name.
Verify verify_policy(std::string_view name);

/// Returns the files of a load of `reads`, which are sorted by file.
std::vector<FileExtents> files_of(const Checkpoint& checkpoint, const std::vector<ReadTuple>& reads, Verify verify);

void bind_checkpoint(nanobind::module_& module);

}  // namespace flashpack
