#pragma once

#include <cstdint>
#include <filesystem>
#include <stdexcept>

namespace flashpack::bench {

/// The page cache has more or less of a file than what is measured needs, and does not let that be changed.
class PageCacheError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The fraction of a range that is in the page cache, 0 to 1, from cachestat(2), else from mincore(2), which is true of
/// files that this process may write. Throws: std::system_error.
double resident_fraction(const std::filesystem::path& path, std::uint64_t offset_bytes = 0,
                         std::uint64_t size_bytes = ~std::uint64_t{0});

/// Writes the file back and drops it from the page cache. False if all of it stays, as it always does on tmpfs. Throws:
/// PageCacheError if a part of it stays, as busy pages do, because figures for a cold file would be wrong;
/// std::system_error.
bool try_drop_from_page_cache(const std::filesystem::path& path);

/// The same. Throws: PageCacheError, too, if all of it stays.
void drop_from_page_cache(const std::filesystem::path& path);

/// Drops the file from the page cache and reads every other stretch of `stripe_bytes`, a multiple of a page. Throws:
/// PageCacheError if less than 99 % of a stretch that was read is in the page cache, or anything of another one;
/// std::system_error.
void warm_every_other(const std::filesystem::path& path, std::uint64_t stripe_bytes);

/// Reads the beginning of the file. False if nothing of it is in the page cache then, as on file systems of FUSE that
/// keep nothing there. Throws: std::system_error.
bool can_stay_in_page_cache(const std::filesystem::path& path);

/// Reads the file until all of it is in the page cache, but for the hundredth at most that a kernel short of memory
/// takes back at once. Throws: PageCacheError when it does not stay there; std::system_error.
void warm_page_cache(const std::filesystem::path& path);

}  // namespace flashpack::bench
