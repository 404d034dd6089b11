/// Finds out, by trying, what this machine and a path on it allow.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace flashpack {

/// One thing that was tried. Programs should use only `key` and whether `limit` is empty; the rest is text for people.
struct Finding {
  std::string key;    ///< Stable, snake_case: "io_uring", "registered_buffers", "direct_io", ...
  std::string value;  ///< The result, as text.
  std::string limit;  ///< Consequence of the result that makes loads slower or impossible; empty if there is none.
  std::string cure;   ///< How to remove the limit; empty without one.
};

/// Returns what the machine allows, under the keys kernel, cpus, seccomp, io_uring, registered_buffers, locked_memory,
/// huge_pages, numa and gpus. If `path` is given, file_system, direct_io and residency follow; residency only if there
/// is a file to ask about. A `path` that is a directory gets an unnamed file for the trial, if it can. Each key appears
/// once. The call takes some milliseconds and reads at most one block of the file. Throws: Error when `path` is neither
/// a file nor a directory nor a block device. Any thread.
std::vector<Finding> probe(const std::filesystem::path& path = {});

}  // namespace flashpack
