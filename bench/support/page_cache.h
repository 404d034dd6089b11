#pragma once

#include <filesystem>

namespace flashpack::bench {

/// The part of the file that is in the page cache, 0 to 1. Throws: std::system_error.
double resident_fraction(const std::filesystem::path& path);

/// Writes the file back and drops it from the page cache. Throws: std::runtime_error when pages stay, because a cold
/// figure of a warm file would be a lie; std::system_error.
void drop_from_page_cache(const std::filesystem::path& path);

/// Reads every other 64 MiB of a file that is not in the page cache. Throws: std::system_error.
void warm_half(const std::filesystem::path& path);

/// Reads the file until all of it is in the page cache. Throws: std::runtime_error when it does not stay there.
void warm_page_cache(const std::filesystem::path& path);

}  // namespace flashpack::bench
