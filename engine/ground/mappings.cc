#include "engine/ground/mappings.h"

#include <fcntl.h>
#include <sys/ioctl.h>

#include <cstdint>

namespace flashpack::internal {

namespace {

// The argument of the kernel's PROCMAP_QUERY, which the headers have from Linux 6.11 on.
struct Query {
  std::uint64_t size_bytes = sizeof(Query);  // In, as is the rest up to the address.
  std::uint64_t options = 0;
  std::uint64_t address = 0;
  std::uint64_t begin = 0;  // Out, as is the rest. It is the mapping that has the address.
  std::uint64_t end = 0;
  std::uint64_t flags = 0;
  std::uint64_t page_bytes = 0;
  std::uint64_t offset_bytes = 0;
  std::uint64_t inode = 0;  // Zero without a file, as is the device. Memory that is shared has a file.
  std::uint32_t device_major = 0;
  std::uint32_t device_minor = 0;
  std::uint32_t name_bytes = 0;  // Neither a name nor a build ID is asked for.
  std::uint32_t build_id_bytes = 0;
  std::uint64_t name = 0;
  std::uint64_t build_id = 0;
};
static_assert(sizeof(Query) == 104);

constexpr unsigned long kQuery = _IOWR('f', 17, Query);
constexpr std::uint64_t kReadable = 1;

int open_maps() noexcept { return ::open("/proc/self/maps", O_RDONLY | O_CLOEXEC); }

bool is_anonymous_and_readable(const Query& found) {
  return (found.flags & kReadable) != 0 && found.inode == 0 && found.device_major == 0 && found.device_minor == 0;
}

// Linux before 6.11 has no such question. This is asked once, so that no descriptor is opened for nothing, and at once,
// because a fork during a first call by another thread would leave the child waiting for the end of that call.
bool can_ask() noexcept {
  static const bool can = [] {
    const UniqueFd maps(open_maps());
    Query query;
    query.address = reinterpret_cast<std::uintptr_t>(&query);
    return ::ioctl(maps.get(), kQuery, &query) == 0;
  }();
  return can;
}
[[maybe_unused]] const bool mappings_asked_at_once = can_ask();

}  // namespace

bool Mappings::are_anonymous_and_readable(std::span<const std::byte> memory) noexcept {
  if (!can_ask()) return false;
  if (!maps_) maps_.reset(open_maps());
  std::uint64_t address = reinterpret_cast<std::uintptr_t>(memory.data());
  const std::uint64_t end = address + memory.size();
  while (address < end) {
    Query query;
    query.address = address;
    if (::ioctl(maps_.get(), kQuery, &query) != 0 || !is_anonymous_and_readable(query)) return false;
    address = query.end;
  }
  return true;
}

}  // namespace flashpack::internal
