/// What a CPU does with the bytes of a chunk: moves through the page cache, copies between slots and memory, checksums,
/// page faults.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <span>

#include "engine/plan.h"

namespace flashpack::internal {

class StripeSums;

/// Bytes of a file as they follow on each other in memory: in a slot or, in place, in the caller's memory.
struct SlotView {
  std::uint64_t offset_bytes = 0;  ///< The place in the file of the first of them.
  std::span<std::byte> bytes;

  std::uint64_t end_bytes() const noexcept { return offset_bytes + bytes.size(); }
  /// The bytes from `begin_bytes` to `end_bytes` of the file. Requires: they are here.
  std::span<std::byte> between(std::uint64_t begin_bytes, std::uint64_t end_bytes) const {
    assert(begin_bytes >= offset_bytes && begin_bytes <= end_bytes && end_bytes <= this->end_bytes());
    return bytes.subspan(begin_bytes - offset_bytes, end_bytes - begin_bytes);
  }
  /// Where the bytes of `fragment` are. Requires: they are here.
  std::byte* of(const Fragment& fragment) const {
    return between(fragment.offset_bytes, fragment.offset_bytes + fragment.size_bytes).data();
  }
};

struct ByteWork {
  enum class Op : std::uint8_t {
    kFromCache,  ///< File to `fragments` or, without any, to `view`, through the page cache and to the end: the sum of
                 ///< their sizes unless the file ends before; see PageCache.
    kToCache,    ///< `fragments` or, without any, `view` to file, through the page cache and to the end.
    kScatter,    ///< `view` to `fragments`.
    kGather,     ///< `fragments` to `view`, which is zeros where there are none.
    kChecksum,   ///< Counts what lies in `view` at the places of `fragments`, see `sums`.
    kPopulate,   ///< Page faults of `view`, as `touch` says, taken ahead of direct I/O; never fails.
  };
  /// What a kFromCache may do with the page cache.
  struct PageCache {
    bool only = false;  ///< Never waits for the disk: -EAGAIN when a byte is not cached or past the end.
    bool drop = false;  ///< What was read is taken out of it, but for what shares a large page with something else.
  };
  /// The page faults of the caller's memory that kPopulate and kChecksum take first.
  enum class Touch : std::uint8_t { kNothing, kForReading, kForWriting };

  Op op;
  int fd = -1;
  SlotView view;
  std::span<const Fragment> fragments;
  PageCache page_cache;
  Touch touch = Touch::kNothing;
  /// The bytes that pass are counted here: those of the fragments and, with kScatter and kChecksum, what lies between
  /// them. Null: they are not counted.
  StripeSums* sums = nullptr;
  const void* transfer = nullptr;  ///< Operations of one transfer may be reported together.
};

/// Does what `work` says, in the calling thread. Returns what IoCompletion::result says.
std::int64_t carry_out(const ByteWork& work);

/// Reads or writes once, again when interrupted. The number of bytes, or -errno.
std::int64_t move_once(int fd, std::uint64_t offset_bytes, std::span<std::byte> memory, bool write);

/// Reads `fragments` from the page cache alone. 0, or an errno: then some of them may have been read, too. EOPNOTSUPP:
/// the file system cannot tell what would wait.
int read_without_waiting(int fd, std::span<const Fragment> fragments);

/// Makes zeros of the bytes in `view` that no fragment goes to. In a store these are few.
void clear_gaps(const SlotView& view, std::span<const Fragment> fragments);

/// Whether all of `memory` has physical pages, so that Op::kPopulate would be for nothing. True also where the kernel
/// will not say; false where some of it is not mapped.
bool is_populated(std::span<std::byte> memory);

}  // namespace flashpack::internal
