/// Which part may have its file opened next.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "engine/mounts.h"
#include "engine/part.h"
#include "engine/tracer.h"

namespace flashpack::internal {

/// The driver's counts for a prefix of paths: a directory, or a mount point. Unlike the file system, it is known before
/// the file is open, so that threads can be counted that are late in an open.
struct PrefixCounts {
  std::uint32_t with_threads = 0;     // Parts below it with a thread. Only counted while a part is held up.
  std::uint32_t late = 0;             // Those of them whose threads are late.
  FileSystem* file_system = nullptr;  // The file system of its files, once known.
  std::uint32_t parts = 0;            // Parts that point to it.
  const std::string* path = nullptr;

  std::size_t held_up_loads() const noexcept { return file_system ? file_system->held_up_loads() : 0; }
};

/// Keeps the state of each part, and counts the parts in each. At most kMaxOpen parts of loads have their files open at
/// a time, and files are opened in the order of the parts' turns.
///
/// A part is held up while its thread is late, or while its file is open and an operation in the same file system is
/// late. Parts that are held up do not count among the kMaxOpen, because other files must be opened meanwhile. At most
/// kHeldUpLimit parts may be held up.
///
/// One server that does not answer must not use up this limit. Before a file is open, only its path tells where it is,
/// so the limit is shared out by paths. A mount point may have half as many parts held up as parts elsewhere leave of
/// the limit: 128 of 256 if there are no others. A directory may have a third, because a link in the path may lead to
/// another mount point. Further parts from there are parked: they wait, although it is their turn, until something that
/// was late has come back.
///
/// Thread safety: one thread.
class OpenParts {
 public:
  using Time = std::chrono::steady_clock::time_point;

  /// `read_mounts` returns the mounts at the time of the call, and asks no file system. `tracer` is told of each file
  /// that has been opened or closed.
  explicit OpenParts(std::function<Mounts()> read_mounts, Tracer tracer = {})
      : read_mounts_(std::move(read_mounts)), tracer_(tracer) {}

  /// A bound on descriptors and threads, and not tuned: loads of 64 files keep the disk as busy as one file does
  /// (bench/README.md, "cold, 64 files in one request").
  static constexpr std::size_t kMaxOpen = 32;
  /// A bound on the threads that may hang: Pool::kMaxThreads has room for as many, and for Jobs::kStuckLimit.
  static constexpr std::size_t kHeldUpLimit = 256;

  /// The part goes from its state to `state`. It goes back to kWaiting when its file could not be opened because the
  /// process has no descriptors left. From then on fewer files are open at a time, and one more with each that is
  /// closed.
  void enter(Part& part, Part::State state, Time now);

  /// The waiting part whose file may be opened now, which has to enter kOpening before the next call, or kOpen if its
  /// file is open. Null if there is none.
  Part* find_next();

  /// The parts in kOpening and kClosing.
  const std::vector<Part*>& with_threads() const noexcept { return with_threads_; }
  /// Finds the threads of parts that have become late.
  void mark_late(Time now);
  /// Number of file systems, directories and mount points that are kept. They are kept until their last part is done,
  /// so that no open, late or stuck operation goes uncounted.
  std::size_t tracked() const noexcept { return file_systems_.size() + prefixes_[0].size() + prefixes_[1].size(); }
  /// To be called when an operation has become late: reads the mounts, because prefixes are looked up from then on.
  void read_mounts() { mounts_ = read_mounts_(); }

 private:
  void tell_of_end(const Part& part, Time now) const;
  void leave_state(Part& part);
  void enter_state(Part& part, Time now);
  std::size_t held_up() const noexcept { return late_ + totals_.held_up_loads; }
  void find_prefixes(Part& part);
  void point(FileSystem*& pointer, FileSystem* file_system);
  void forget_places_of(Part& part);
  bool has_share(const PrefixCounts& prefix, unsigned shares) const;
  bool prefixes_have_shares(const Part& part) const;
  void enter_prefixes(Part& part);
  void leave_prefixes(Part& part);

  std::map<std::uint64_t, Part*> waiting_;  // Parts to be opened, sorted by turn.
  std::map<std::uint64_t, Part*> parked_;   // Likewise, but their prefixes have used up their share.
  bool look_at_parked_ = false;             // Parked parts may have room now.
  FileSystem::Totals totals_;
  std::map<std::uint64_t, FileSystem> file_systems_;             // One for each device number.
  std::array<std::map<std::string, PrefixCounts>, 2> prefixes_;  // Directories and mount points.
  const std::function<Mounts()> read_mounts_;
  const Tracer tracer_;
  Mounts mounts_;  // The mounts when something last became late.
  std::vector<Part*> with_threads_;
  std::size_t open_ = 0;  // Parts of loads from kOpening to kClosing.
  std::size_t late_ = 0;  // Those of them whose threads are late.
  std::size_t max_open_ = kMaxOpen;
};

}  // namespace flashpack::internal
