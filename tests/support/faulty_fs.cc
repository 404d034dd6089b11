// A FUSE file system whose files fail, each in its own way. Their bytes are a function of the offset (faulty_fs.h).
//
// usage: faulty_fs READY_FD RELEASE_FD MOUNTPOINT
//
// Writes a byte to READY_FD when it is mounted, and one for each read that gets stuck. /stuck answers when RELEASE_FD,
// the reading end of a pipe, has come to its end, or after kHang.
#define FUSE_USE_VERSION 31
#include <fuse3/fuse.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "tests/support/faulty_fs.h"
#include "tests/support/hang.h"

namespace {

using namespace flashpack::testing::faulty_fs;

int ready_fd = -1;
int release_fd = -1;
std::atomic<unsigned> reads = 0;

bool touches(std::uint64_t offset, std::size_t size, std::uint64_t where) {
  return offset < where + 4096 && where < offset + size;
}

void tell() {
  const char byte = 1;
  if (::write(ready_fd, &byte, 1) != 1) std::abort();
}

void* on_init(fuse_conn_info*, fuse_config* config) {
  config->direct_io = 1;        // Every read comes here, as it was asked.
  config->attr_timeout = 3600;  // As a file system on a network does, but longer: fstat is answered from what was told.
  tell();
  return nullptr;
}

int on_getattr(const char* path, struct stat* status, fuse_file_info*) {
  *status = {};
  if (std::string_view(path) == "/") {
    status->st_mode = S_IFDIR | 0755;
    status->st_nlink = 2;
    return 0;
  }
  if (std::find(kNames.begin(), kNames.end(), path + 1) == kNames.end()) return -ENOENT;
  // After the first reads nothing is known of /lost.
  if (std::string_view(path) == "/lost" && reads > 0) return -EIO;
  status->st_mode = S_IFREG | 0644;
  status->st_nlink = 1;
  status->st_size = static_cast<off_t>(kFileBytes);
  // The first reads of /changing change it.
  if (std::string_view(path) == "/changing") status->st_mtim.tv_sec = reads > 0 ? 2 : 1;
  return 0;
}

int on_open(const char*, fuse_file_info* info) {
  info->direct_io = 1;
  return 0;
}

int on_read(const char* path, char* buffer, std::size_t size, off_t at, fuse_file_info*) {
  const std::string_view name = path + 1;
  const auto offset = static_cast<std::uint64_t>(at);
  const bool odd = reads++ % 2 == 0;
  if (name == "eio" && touches(offset, size, kBadOffset)) return -EIO;
  if (name == "eintr" && odd) return -EINTR;
  if (name == "eagain" && odd) return -EAGAIN;
  if (name == "short") size = std::min<std::size_t>(size, 64'536);
  if (name == "stuck" && offset >= kStuckOffset) {
    tell();
    pollfd released{.fd = release_fd, .events = POLLIN};
    ::poll(&released, 1, std::chrono::milliseconds(flashpack::testing::kHang).count());
  }
  const std::uint64_t end = name == "early" ? kBadOffset : kFileBytes;
  if (offset >= end) return 0;
  size = static_cast<std::size_t>(std::min<std::uint64_t>(size, end - offset));
  for (std::size_t i = 0; i < size; ++i) buffer[i] = static_cast<char>(byte_at(offset + i));
  return static_cast<int>(size);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  ready_fd = std::atoi(argv[1]);
  release_fd = std::atoi(argv[2]);
  fuse_operations operations{};
  operations.init = on_init;
  operations.getattr = on_getattr;
  operations.open = on_open;
  operations.read = on_read;
  // Read-only, or each read would make the kernel ask for the time of access, and with it for the rest.
  std::array<char*, 4> arguments = {argv[0], const_cast<char*>("-f"), const_cast<char*>("-oro"), argv[3]};
  return fuse_main(static_cast<int>(arguments.size()), arguments.data(), &operations, nullptr);
}
