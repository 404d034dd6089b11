/// The driver's counts for a file system that may not answer.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

namespace flashpack::internal {

/// The driver's counts for one file system. The parts of loads that are open there are held up while one of its
/// operations is late. Each add function has its remove function; the other functions ask. Thread safety: one thread.
class FileSystem {
 public:
  /// The sums over all file systems that the driver needs in every turn of its loop.
  struct Totals {
    std::size_t held_up_loads = 0;  // Parts of loads that are open in a file system in which an operation is late.
    bool answers_again = false;     // The last late operation of a file system has come back; reset by OpenParts.
  };

  /// Borrows the totals, which it keeps up to date.
  explicit FileSystem(Totals& totals) : totals_(totals) {}

  void add_load() noexcept {
    ++loads_;
    totals_.held_up_loads += late_ > 0;
  }
  void remove_load() noexcept {
    assert(loads_ > 0);
    --loads_;
    totals_.held_up_loads -= late_ > 0;
  }
  void add_late() noexcept {
    if (late_++ == 0) totals_.held_up_loads += loads_;
  }
  void remove_late() noexcept {
    assert(late_ > 0);
    if (--late_ > 0) return;
    totals_.held_up_loads -= loads_;
    totals_.answers_again = true;
  }

  void add_stuck() noexcept { ++stuck_; }
  void remove_stuck() noexcept {
    assert(stuck_ > 0);
    --stuck_;
  }
  void add_slot() noexcept { ++slots_; }
  void remove_slot() noexcept {
    assert(slots_ > 0);
    --slots_;
  }
  void add_user() noexcept { ++users_; }
  /// Returns whether it was the last one.
  bool remove_user() noexcept {
    assert(users_ > 0);
    return --users_ == 0;
  }

  /// Parts of loads that are open.
  std::uint32_t loads() const noexcept { return loads_; }
  /// Operations that are late.
  std::uint32_t late() const noexcept { return late_; }
  /// Operations that are late or abandoned.
  std::uint32_t stuck() const noexcept { return stuck_; }
  /// Slots of operations that it has not answered.
  std::uint32_t slots() const noexcept { return slots_; }
  /// Parts of loads that are held up.
  std::size_t held_up_loads() const noexcept { return late_ > 0 ? loads_ : 0; }

 private:
  Totals& totals_;
  std::uint32_t loads_ = 0;
  std::uint32_t late_ = 0;
  std::uint32_t stuck_ = 0;
  std::uint32_t slots_ = 0;
  std::uint32_t users_ = 0;  // Parts and prefixes that point to it.
};

}  // namespace flashpack::internal
