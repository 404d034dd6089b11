#pragma once

#include <cstdint>
#include <filesystem>

namespace flashpack::bench {

/// The fraction of a range that is in the page cache, 0 to 1, from cachestat(2), else from mincore(2), which is true of
/// files that this process may write. Throws: std::system_error.
double resident_fraction(const std::filesystem::path& path, std::uint64_t offset_bytes = 0,
                         std::uint64_t size_bytes = ~std::uint64_t{0});

/// Writes the file back and drops it from the page cache. False if pages stay, as they always do on tmpfs. Throws:
/// std::system_error.
bool try_drop_from_page_cache(const std::filesystem::path& path);

/// The same. Throws: std::runtime_error if pages stay, because figures for a cold file would be wrong;
/// std::system_error.
void drop_from_page_cache(const std::filesystem::path& path);

/// Drops the file from the page cache and reads every other stretch of `stripe_bytes`, a multiple of a page. Throws:
/// std::runtime_error if a stretch is not wholly in or out of the page cache as it should be; std::system_error.
void warm_every_other(const std::filesystem::path& path, std::uint64_t stripe_bytes);

/// Reads the beginning of the file. False if nothing of it is in the page cache then, as on file systems of FUSE that
/// keep nothing there. Throws: std::system_error.
bool can_stay_in_page_cache(const std::filesystem::path& path);

/// Reads the file until all of it is in the page cache. Throws: std::runtime_error when it does not stay there;
/// std::system_error.
void warm_page_cache(const std::filesystem::path& path);

}  // namespace flashpack::bench
