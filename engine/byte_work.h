/// The work of a CPU on the bytes of a chunk: reads and writes through the page cache, copies between slots and memory,
/// checksums, page faults. Any thread may call the functions here, for bytes that no other thread uses.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <span>

#include "engine/plan.h"

namespace flashpack::internal {

class StripeSums;
class PagePolicy;

/// Contiguous bytes of a chunk, in a slot or in the caller's memory. Their offsets are those that the fragments have.
struct ChunkView {
  std::uint64_t offset_bytes = 0;  ///< Offset of the first byte.
  std::span<std::byte> bytes;

  std::uint64_t end_bytes() const noexcept { return offset_bytes + bytes.size(); }
  /// The bytes from `begin_bytes` to `end_bytes`. Requires: the view has them.
  std::span<std::byte> between(std::uint64_t begin_bytes, std::uint64_t end_bytes) const {
    assert(begin_bytes >= offset_bytes && begin_bytes <= end_bytes && end_bytes <= this->end_bytes());
    return bytes.subspan(begin_bytes - offset_bytes, end_bytes - begin_bytes);
  }
  /// Address of the bytes of `fragment`. Requires: the view has them.
  std::byte* of(const Fragment& fragment) const {
    return between(fragment.offset_bytes, fragment.offset_bytes + fragment.size_bytes).data();
  }
};

struct ByteWork {
  enum class Op : std::uint8_t {
    kFromCache,  ///< Reads `fragments` through the page cache. The result is the sum of their sizes, or less if the
                 ///< file ends before. See PageCache.
    kToCache,    ///< Writes all of `fragments` through the page cache.
    kScatter,    ///< Copies `view` to `fragments`.
    kGather,     ///< Copies `fragments` to `view`, with zeros between them.
    kChecksum,   ///< Counts the bytes of `fragments` in `view`; see `sums`.
    kPopulate,   ///< Takes the page faults of `view`, as `touch` says, before direct I/O. Never fails.
  };
  /// Options of kFromCache.
  struct PageCache {
    bool only = false;  ///< Never waits for the disk. The result is -EAGAIN if a byte is not cached or past the end.
    bool drop = false;  ///< Drops what was read from the page cache. A large page that has other bytes, too, stays.
  };
  /// The page faults that kPopulate and kChecksum take, in the caller's memory or in a fresh slot.
  enum class Touch : std::uint8_t { kNothing, kForReading, kForWriting };

  Op op;
  int fd = -1;
  ChunkView view;
  std::span<const Fragment> fragments;
  PageCache page_cache;
  Touch touch = Touch::kNothing;
  /// If set, the moved bytes go into these sums; for kScatter and kChecksum those between the fragments, too.
  StripeSums* sums = nullptr;
  const void* transfer = nullptr;     ///< Names the transfer, whose operations may be reported together.
  PagePolicy* page_policy = nullptr;  ///< Null if nobody wants to know.
};

/// Carries out `work` in the calling thread. Returns an IoCompletion::result.
std::int64_t carry_out(const ByteWork& work);

/// Reads or writes once, and up to 100 times again after EINTR and EAGAIN. Returns the number of bytes, or -errno.
std::int64_t move_once(int fd, std::uint64_t offset_bytes, std::span<std::byte> memory, bool write);

/// Reads `fragments` from the page cache only. Returns 0, or an errno, after which some may have been read. EOPNOTSUPP
/// means that the file system cannot tell whether a read would wait.
int read_without_waiting(int fd, std::span<const Fragment> fragments);

/// Writes zeros to the bytes of `view` that belong to no fragment.
void clear_gaps(const ChunkView& view, std::span<const Fragment> fragments);

/// Whether all of `memory` has physical pages, so that Op::kPopulate is not needed. True also if the kernel does not
/// tell; false if some of the memory is not mapped.
bool is_populated(std::span<std::byte> memory);

}  // namespace flashpack::internal
