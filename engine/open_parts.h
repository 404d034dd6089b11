/// Which part may have its file opened next.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "engine/mounts.h"
#include "engine/part.h"

namespace flashpack::internal {

/// The driver's counts for a directory or a mount point. These are known from the path, before the file is open, and so
/// can count threads that are late in an open.
struct Place {
  std::uint32_t with_threads = 0;     // Counted parts that are being opened or closed.
  std::uint32_t late = 0;             // Those of them whose threads are late.
  FileSystem* file_system = nullptr;  // The file system of its files, once known.

  std::size_t held_up_loads() const noexcept { return file_system ? file_system->held_up_loads() : 0; }
};

/// The parts of all transfers, in whichever state they are. Only kMaxOpen parts of loads have their files open at a
/// time, in the order of their turns.
///
/// A file system that does not answer must not use up these. Therefore a part that is held up does not count: one whose
/// thread is late, or whose file is open while an operation is late in its file system. At most kHeldUpLimit parts can
/// be held up. In order that one server does not take all of these, a mount point gets at most half of what the parts
/// elsewhere leave, and a directory a third, because a link in a path may lead to another file system. Further parts
/// from there are parked until something has come back.
///
/// Thread safety: one thread.
class OpenParts {
 public:
  using Time = std::chrono::steady_clock::time_point;

  static constexpr std::size_t kMaxOpen = 32;
  static constexpr std::size_t kHeldUpLimit = 256;

  /// The part goes from its state to `state`. A part that has been opened goes back to kWaiting if the process has no
  /// descriptors left; then fewer files are open at a time until files have been closed.
  void enter(Part& part, Part::State state, Time now);

  /// The waiting part whose file may be opened now, which has to enter kOpening before the next call. Null if there is
  /// none.
  Part* next();

  /// The parts in kOpening and kClosing.
  const std::vector<Part*>& with_threads() const noexcept { return with_threads_; }
  /// Finds the threads of parts that have become late.
  void mark_late(Time now);
  /// To be called when an operation has become late: reads the mount points, because places are looked up from then on.
  void read_mounts() { mounts_.read(); }

 private:
  void leave_state(Part& part);
  void enter_state(Part& part, Time now);
  std::size_t held_up() const;
  std::array<Place*, 2> places_of(const Part& part);
  bool has_share(const Place& place, unsigned shares) const;
  bool places_have_shares(const Part& part) const;
  void enter_places(Part& part);
  void leave_places(Part& part);

  std::map<std::uint64_t, Part*> waiting_;              // Parts to be opened, sorted by turn.
  std::map<std::uint64_t, Part*> parked_;               // Likewise, but their places have used up their share.
  bool look_at_parked_ = false;                         // Something that was late has come back.
  std::map<std::uint64_t, FileSystem> file_systems_;    // One for each device number; never removed.
  std::array<std::map<std::string, Place>, 2> places_;  // Directories and mount points; never removed.
  Mounts mounts_;                                       // The mount points when something last became late.
  std::vector<Part*> with_threads_;
  std::size_t open_ = 0;  // Parts of loads from kOpening to kClosing.
  std::size_t late_ = 0;  // Those of them whose threads are late.
  std::size_t max_open_ = kMaxOpen;
};

}  // namespace flashpack::internal
