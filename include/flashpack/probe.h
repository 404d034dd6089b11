/// What this machine and this path allow, found by trying.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace flashpack {

/// One thing that was tried. Text is for people; only `key` and whether `limit` is empty are for programs.
struct Finding {
  std::string key;    ///< Stable, snake_case: "io_uring", "registered_buffers", "direct_io", ...
  std::string value;  ///< What was found.
  std::string limit;  ///< What is slower or impossible because of it; empty when nothing is.
  std::string cure;   ///< What to do about the limit.
};

/// The machine: kernel, cpus, seccomp, io_uring, registered_buffers, locked_memory, huge_pages, numa, gpus. With a
/// `path`, a file or a directory (where a file without a name is made for the trial), also file_system, direct_io,
/// residency. Keys are unique. Takes some milliseconds; reads at most one block of the file. Throws: Error when there
/// is nothing at `path`, or it is neither.
std::vector<Finding> probe(const std::filesystem::path& path = {});

}  // namespace flashpack
