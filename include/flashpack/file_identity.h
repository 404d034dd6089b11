#pragma once

#include <cstdint>

namespace flashpack {

/// Which file, and which state of it: two equal identities mean the same bytes unless somebody stored through a
/// mapping. From fstat(2): st_dev, st_ino, st_size, st_mtim.
struct FileIdentity {
  std::uint64_t dev = 0;
  std::uint64_t ino = 0;
  std::uint64_t size_bytes = 0;
  std::int64_t mtime_ns = 0;

  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

}  // namespace flashpack
