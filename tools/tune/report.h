/// Prints what flashpack_tune has measured.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "tools/tune/cell.h"
#include "tools/tune/policies.h"
#include "tools/tune/subject.h"

namespace flashpack::bench {

/// The settings that were measured with one kind of work; none if it was not measured.
struct Table {
  std::vector<Cell> cells;    ///< The one that others are compared with is first.
  std::string limit;          ///< What kept it from being faster.
  double plain_gb_per_s = 0;  ///< Plain reads, or writes, of the disk; 0 if they were not or could not be measured.
};

/// How a candidate did in turns with the default, in one way to read.
struct WayInTurns {
  Work work;
  std::vector<double> ratios = {};  ///< Speed relative to the default, of each pair: 1.1 for a tenth faster.
  double default_gb_per_s = 0;      ///< In the median.
};

/// How a candidate did in turns with the default, in every way that was measured.
struct Turns {
  Setting setting;
  std::vector<WayInTurns> ways;
  bool better = false;  ///< Whether it takes the place of the default.
};

struct Report {
  std::filesystem::path directory;
  Device device;                     ///< Where loads went.
  std::string server;                ///< What a network file system is mounted from; empty if it is none.
  std::uint64_t read_bytes = 0;      ///< Size of one sample from the disk if there is one, else from the page cache.
  std::uint64_t verified_bytes = 0;  ///< Bytes that the last measured load compared with checksums.
  double link_gb_per_s = 0;          ///< Speed of copies to a GPU; 0 for the host, or if not known.
  Table disk;
  Table page_cache;
  Table writes;
  std::string no_page_cache;       ///< Why loads from the page cache were not measured; empty if they were.
  std::string no_writes;           ///< Why writes could not be measured although it was asked for; else empty.
  std::string no_backend;          ///< Why backends were not compared although it was asked for; else empty.
  std::vector<PolicyCell> cold;    ///< Policies with nothing in the page cache; none if they were not measured.
  std::vector<PolicyCell> cached;  ///< The same with the whole file in it.
  std::string no_cold, no_cached;  ///< Why policies could not be compared so although it was asked for; else empty.
  std::string no_latency;          ///< Why requests were not timed; empty if they were.
  Setting pick = kUsual;           ///< The best of the tables, then the candidate that had its turns last.
  std::vector<Turns> turns;  ///< In the order in which they were taken; none if the default was best in the tables.
  bool kept_default = true;
  std::string kept;             ///< The file of the profile.
  std::string not_kept;         ///< Why there is none.
  std::string fallback_reason;  ///< What the engine did without.
};

/// The setting that was decided for.
inline const Setting& setting_of(const Report& report) { return report.kept_default ? kUsual : report.pick; }

/// "cpu" or "cuda:0".
std::string text_of(const Device& device);

/// "4 MiB x 8, default workers", ", 32 MiB staging" if that is given, and ", reads by them" if that is the backend.
std::string text_of(const Setting& setting);

/// For people, on standard output.
void print_text(const Report& report);

/// One JSON object in one line.
std::string json_of(const Report& report);

}  // namespace flashpack::bench
