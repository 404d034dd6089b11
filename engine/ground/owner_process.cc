#include "flashpack/detail/owner_process.h"

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <exception>
#include <new>
#include <span>
#include <string>

#include "engine/ground/host_region.h"
#include "engine/ground/pages.h"
#include "flashpack/error.h"

namespace flashpack::detail {

namespace {

using Word = std::atomic<std::uint64_t>;

// Returns a word that is zero in a new process, until somebody writes to it. The kernel clears it (MADV_WIPEONFORK) for
// each child that has memory of its own. getpid() would not do, because a child in another pid namespace may have the
// pid of its parent, nor a handler of pthread_atfork(3), because nobody calls it for clone(2), which makes such
// children. Only where the kernel refuses, as gVisor's does, a handler clears the word.
Word& new_word() noexcept {
  const std::uint32_t page_bytes = internal::system_page_bytes();
  const std::span<std::byte> page = internal::map_memory(page_bytes, page_bytes);
  if (!page.empty() && ::madvise(page.data(), page.size(), MADV_WIPEONFORK) == 0) return *new (page.data()) Word(0);
  internal::unmap(page);
  static Word word = 0;
  // Only a lack of memory makes this fail. It runs while the program is loaded, so nothing is lost if the process ends.
  if (::pthread_atfork(nullptr, nullptr, [] { word = 0; }) != 0) std::terminate();
  return word;
}

// The word is made while the program is loaded. A fork during a first call by another thread would leave the child
// waiting for the end of that call.
[[maybe_unused]] const std::uint64_t made_at_once = process_number();

}  // namespace

std::uint64_t process_number() noexcept {
  static Word& word = new_word();
  static Word last = 0;  // A child inherits it, and goes on from there.
  std::uint64_t number = word.load();
  if (number != 0) return number;
  const std::uint64_t next = ++last;
  return word.compare_exchange_strong(number, next) ? next : number;
}

void OwnerProcess::require_current(const char* object) const {
  if (!is_current()) throw Error(Errc::kUnusable, std::string(object) + " of the parent process, used after fork");
}

}  // namespace flashpack::detail
