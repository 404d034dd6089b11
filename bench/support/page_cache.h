#pragma once

#include <cstdint>
#include <filesystem>

namespace flashpack::bench {

/// The part of a range that is in the page cache, 0 to 1, from cachestat(2). Throws: std::system_error.
double resident_fraction(const std::filesystem::path& path, std::uint64_t offset_bytes = 0,
                         std::uint64_t size_bytes = ~std::uint64_t{0});

/// Writes the file back and drops it from the page cache. False when pages stay: always on a file system that is
/// nothing but page cache, as tmpfs is. Throws: std::system_error.
bool try_drop_from_page_cache(const std::filesystem::path& path);

/// The same. Throws: std::runtime_error when pages stay, because a cold figure of a warm file would be a lie;
/// std::system_error.
void drop_from_page_cache(const std::filesystem::path& path);

/// Takes the file out of the page cache and reads every other `stripe_bytes`, a multiple of a page. Throws:
/// std::runtime_error when a stripe is neither wholly in the page cache nor wholly out of it as it should be;
/// std::system_error.
void warm_every_other(const std::filesystem::path& path, std::uint64_t stripe_bytes);

/// Reads the file until all of it is in the page cache. Throws: std::runtime_error when it does not stay there.
void warm_page_cache(const std::filesystem::path& path);

}  // namespace flashpack::bench
