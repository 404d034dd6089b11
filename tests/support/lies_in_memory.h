#pragma once

#include <linux/magic.h>
#include <sys/vfs.h>

#include <cerrno>
#include <filesystem>
#include <system_error>

#include "bench/support/page_cache.h"

namespace flashpack::testing {

/// Whether a file's pages are the only place where its bytes are, so that they cannot be dropped. An overlay does not
/// say what lies below it, so that a drop is tried there.
inline bool lies_in_memory(const std::filesystem::path& file) {
  struct statfs system{};
  if (::statfs(file.c_str(), &system) != 0) throw std::system_error(errno, std::generic_category(), file.string());
  if (system.f_type == OVERLAYFS_SUPER_MAGIC) return !bench::try_drop_from_page_cache(file);
  return system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC;
}

}  // namespace flashpack::testing
