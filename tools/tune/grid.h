/// The settings that can be measured: where a search begins, and what lies beside a setting. It is pure.
#pragma once

#include <cstdint>
#include <vector>

#include "tools/tune/cell.h"

namespace flashpack::bench {

/// The settings of the first round: `usual`, then chunks and depths that lie far apart.
std::vector<Setting> coarse_settings(const Setting& usual);
/// `usual`, then the same with 1, 2, 4, ... workers, up to twice as many as there are cores. An engine without a number
/// has `usual_workers`, a number that has no setting of its own, because that would be the same engine once more.
std::vector<Setting> worker_settings(const Setting& usual, unsigned cores, unsigned usual_workers);
/// Those with twice or half of the chunk size or queue depth of `of`.
std::vector<Setting> beside_on_disk(const Setting& of);

/// The same as coarse_settings(), and settings whose reads the workers carry out instead of io_uring.
std::vector<Setting> coarse_settings_of_backends(const Setting& usual);
/// The same as beside_on_disk(), and `of` with the other backend. The number of workers is searched, too, where they
/// carry out the reads, because it bounds the reads in flight, as the queue depth does, which therefore grows with it;
/// an engine without a number has `usual_workers`.
std::vector<Setting> beside_with_backends(const Setting& of, const Setting& usual, unsigned usual_workers);

/// The settings of the first round where the workers carry out all reads: `usual`, then chunks and numbers of workers
/// that lie far apart. An engine without a number has `usual_workers`. No depth is below the usual one, because a
/// profile may be used where io_uring is allowed, too.
std::vector<Setting> coarse_settings_of_workers(const Setting& usual, unsigned usual_workers);
/// Those with twice or half of the chunk size or number of workers of `of`.
std::vector<Setting> beside_by_workers(const Setting& of, const Setting& usual, unsigned usual_workers);

/// Settings for loads from the page cache to a GPU: chunk sizes, staging memory and numbers of workers.
///
/// Each keeps as many bytes in flight from a disk as `usual`, as far as its slots are enough, so that loads from the
/// disk suffer as little as they can.
class SlotGrid {
 public:
  /// An engine with `usual` has `staging_bytes`, whether `usual` gives them or the engine chooses, and one without a
  /// number of workers has `usual_workers`.
  SlotGrid(const Setting& usual, std::uint64_t staging_bytes, unsigned usual_workers, unsigned cores)
      : usual_(usual), staging_bytes_(staging_bytes), usual_workers_(usual_workers), cores_(cores) {}

  /// `usual`, then chunks and staging memory that lie far apart.
  std::vector<Setting> coarse() const;
  /// The settings with the next chunk size, staging memory or number of workers. Requires: `of` is one of the grid.
  std::vector<Setting> beside(const Setting& of) const;

 private:
  Setting at(std::uint64_t chunk_bytes, std::uint64_t staging_bytes, std::uint32_t workers) const;

  Setting usual_;
  std::uint64_t staging_bytes_;
  unsigned usual_workers_;
  unsigned cores_;
};

}  // namespace flashpack::bench
