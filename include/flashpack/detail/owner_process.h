/// For this library's own objects that a forked child must leave to its parent. Users of the library do not need it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace flashpack::detail {

/// Returns a number for the calling process. The processes that it was forked from have other numbers. A call only
/// reads memory. Thread safety: any thread.
std::uint64_t process_number() noexcept;

/// The process that has made the object. A forked child has a copy of the object, but none of the threads that work on
/// it, and other threads may have held its mutexes at the fork. Thread safety: any thread.
class OwnerProcess {
 public:
  bool is_current() const noexcept { return number_ == process_number(); }
  /// Throws: Error (kUnusable) in a forked child, with `object` in the message.
  void require_current(const char* object) const;

 private:
  std::uint64_t number_ = process_number();
};

/// Empties a smart pointer or a container, and does not destroy what was in it, which belongs to the parent of this
/// process.
template <class Owner>
void leave_to_parent(Owner& owner) noexcept {
  alignas(Owner) std::byte memory[sizeof(Owner)];
  new (memory) Owner(std::move(owner));
}

}  // namespace flashpack::detail
