#include "flashpack/probe.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string_view>
#include <thread>

#include "engine/file.h"
#include "engine/ground/cpu_quota.h"
#include "engine/ground/error.h"
#include "engine/ground/first_line.h"
#include "engine/ground/reasons.h"
#include "engine/mounts.h"
#include "engine/residency.h"
#include "engine/ring.h"
#include "engine/staging.h"

namespace flashpack {

namespace {

namespace fs = std::filesystem;
using internal::errno_code;
using internal::first_line;

// A huge page, of which memory that is registered has at least one.
constexpr std::uint32_t kSlotBytes = std::uint32_t{2} << 20;

// The rest of the first line that begins with `name`, in a file like /proc/self/status.
std::string field(const fs::path& path, std::string_view name) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(name, 0) != 0) continue;
    const auto begin = line.find_first_not_of(" \t", name.size());
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

std::string size_text(std::uint64_t bytes) {
  for (const char* unit : {"bytes", "KiB", "MiB"}) {
    if (bytes < 1024 || bytes % 1024 != 0) return std::to_string(bytes) + " " + unit;
    bytes /= 1024;
  }
  return std::to_string(bytes) + " GiB";
}

Finding kernel() {
  utsname name{};
  ::uname(&name);
  return {.key = "kernel", .value = std::string(name.sysname) + " " + name.release};
}

Finding cpus() {
  Finding finding{.key = "cpus", .value = std::to_string(std::thread::hardware_concurrency())};
  if (const auto allowed = internal::cpu_quota(); allowed && *allowed < std::thread::hardware_concurrency()) {
    std::ostringstream text;
    text << "the control group allows " << *allowed << " of them, which slows copies from the page cache";
    finding.limit = text.str();
    finding.cure = "raise the container's CPU limit";
  }
  return finding;
}

bool filtered() { return field("/proc/self/status", "Seccomp:") == "2"; }

Finding seccomp() { return {.key = "seccomp", .value = filtered() ? "a filter is in place" : "none"}; }

std::string cure_of_refusal(int error_number) {
  const std::string disabled = first_line("/proc/sys/kernel/io_uring_disabled");
  if (error_number == EPERM && !disabled.empty() && disabled != "0") return "sysctl kernel.io_uring_disabled=0";
  if (error_number == ENOMEM) return "raise ulimit -l, or the container's memory limit";
  if (filtered()) {
    return "a seccomp profile that allows io_uring_setup, io_uring_enter and io_uring_register: docker run "
           "--security-opt seccomp=PROFILE.json, in Kubernetes securityContext.seccompProfile";
  }
  return error_number == ENOSYS ? "a kernel with io_uring (Linux 5.15, not gVisor)" : "ask who confines this process";
}

const char* text_of(internal::Ring::Rung rung) {
  switch (rung) {
    case internal::Ring::Rung::kDeferred:
      return "with DEFER_TASKRUN";
    case internal::Ring::Rung::kCooperative:
      return "with COOP_TASKRUN";
    case internal::Ring::Rung::kBare:
      return "without flags";
  }
  return "";
}

// Reads into a slot until the ring has registered the slot, or has said why it could not.
void use_slot(internal::Ring& ring, const internal::Staging& staging, int fd) {
  for (int use = 0; use < 3 && !ring.refuses(); ++use) {
    ring.push(0, {.op = internal::DiskRequest::Op::kRead, .fd = fd, .memory = staging.slots()[0], .slot = 0});
    while (ring.wait(std::nullopt).empty()) {
    }
  }
}

void add_ring(std::vector<Finding>& findings, const internal::Staging& staging) {
  Finding ring_finding{.key = "io_uring"};
  Finding buffers{.key = "registered_buffers", .value = "not tried"};
  try {
    internal::Ring ring(4, staging.slots());
    ring_finding.value = text_of(ring.rung());
    ring_finding.limit = ring.fallback_reason();
    if (!ring_finding.limit.empty()) ring_finding.cure = "a newer kernel; how much CPU time that saves is not measured";
    const auto before = ring.fallback_reason().size();
    const internal::UniqueFd self(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
    use_slot(ring, staging, self.get());
    const std::string reason = ring.fallback_reason().substr(before);
    buffers.value = reason.empty() ? "yes" : "no";
    buffers.limit = reason.empty() ? "" : reason + ": the kernel looks up the pages of each read";
    if (!reason.empty()) {
      buffers.cure =
          "ulimit -l unlimited, docker run --ulimit memlock=-1, systemd LimitMEMLOCK=infinity, or CAP_IPC_LOCK";
    }
  } catch (const std::system_error& error) {
    ring_finding.value = "refused";
    ring_finding.limit = std::string(error.what()) + "; the workers read instead, nearly as fast";
    ring_finding.cure = cure_of_refusal(error.code().value());
  }
  findings.push_back(std::move(ring_finding));
  findings.push_back(std::move(buffers));
}

Finding locked_memory() {
  Finding finding{.key = "locked_memory"};
  rlimit limit{};
  ::getrlimit(RLIMIT_MEMLOCK, &limit);
  finding.value = limit.rlim_cur == RLIM_INFINITY ? "unlimited" : size_text(limit.rlim_cur);
  constexpr unsigned kIpcLock = 14;  // Bit of CAP_IPC_LOCK in <linux/capability.h>.
  const auto capabilities = std::strtoull(field("/proc/self/status", "CapEff:").c_str(), nullptr, 16);
  if ((capabilities >> kIpcLock) & 1) finding.value += ", lifted by CAP_IPC_LOCK";
  return finding;
}

// KiB of huge pages in the mapping that `address` lies in.
std::uint64_t huge_kilobytes_at(const void* address) {
  std::ifstream in("/proc/self/smaps");
  const auto wanted = reinterpret_cast<std::uintptr_t>(address);
  bool inside = false;
  for (std::string line; std::getline(in, line);) {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) inside = begin <= wanted && wanted < end;
    if (inside && line.rfind("AnonHugePages:", 0) == 0) return std::strtoull(line.c_str() + 14, nullptr, 10);
  }
  return 0;
}

Finding huge_pages(const internal::Staging& staging) {
  Finding finding{.key = "huge_pages"};
  const auto slot = staging.slots()[1];
  std::memset(slot.data(), 0, slot.size());
  if (huge_kilobytes_at(slot.data()) * 1024 >= slot.size()) {
    finding.value = "yes";
    return finding;
  }
  finding.value = "no";
  finding.limit = "staging lies on small pages: large reads are split, at up to half the speed and more CPU";
  finding.cure = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
  if (const std::string now = first_line("/sys/kernel/mm/transparent_hugepage/enabled"); !now.empty())
    finding.cure += " (now " + now + ")";
  return finding;
}

Finding numa() {
  int nodes = 0;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator("/sys/devices/system/node", ignored)) {
    const std::string name = entry.path().filename();
    nodes += name.rfind("node", 0) == 0 && name.find_first_not_of("0123456789", 4) == std::string::npos;
  }
  return {.key = "numa", .value = nodes > 1 ? std::to_string(nodes) + " nodes" : "one node"};
}

Finding gpus() {
  Finding finding{.key = "gpus"};
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator("/sys/bus/pci/devices", ignored)) {
    const bool nvidia = first_line(entry.path() / "vendor") == "0x10de";
    if (!nvidia || first_line(entry.path() / "class").rfind("0x03", 0) != 0) continue;
    internal::add_reason(finding.value, entry.path().filename().string() + " on node " +
                                            first_line(entry.path() / "numa_node") + ", " +
                                            first_line(entry.path() / "current_link_speed") + " x" +
                                            first_line(entry.path() / "current_link_width"));
  }
  if (finding.value.empty()) finding.value = "none";
  return finding;
}

Finding file_system(const fs::path& path) {
  std::error_code ignored;
  const internal::Mounts mounts = internal::Mounts::of_process();
  const internal::MountInfo* const mount = mounts.find(fs::canonical(path, ignored));
  return {.key = "file_system", .value = mount ? mount->file_system : "unknown"};
}

Finding direct_io(const internal::File& file, const internal::Staging& staging) {
  constexpr const char* kCure = "keep checkpoints on a local ext4 or XFS, in a container on a volume";
  Finding finding{.key = "direct_io"};
  std::error_code error = file.direct_error();
  if (file.direct_fd() >= 0) {
    const auto memory = staging.slots()[0].first(file.alignment().block_bytes);
    error = errno_code(::pread(file.direct_fd(), memory.data(), memory.size(), 0) < 0 ? errno : 0);
  }
  if (error) {
    finding.value = "no";
    finding.limit = error.message() + ": every read goes through the page cache";
    finding.cure = kCure;
    return finding;
  }
  finding.value = size_text(file.alignment().block_bytes) + " blocks";
  if (file.may_block()) {
    finding.limit = "reads wait in threads of the kernel: more CPU, and where it is a network, its latency";
    finding.cure = kCure;
  }
  return finding;
}

Finding residency(const internal::File& file) {
  internal::Residency residency(file.buffered_fd());
  residency.seems_cached(0, std::max<std::uint64_t>(file.identity().size_bytes, 1));
  Finding finding{.key = "residency", .limit = residency.fallback_reason()};
  switch (residency.method()) {
    case internal::Residency::Method::kCachestat:
      finding.value = "cachestat";
      break;
    case internal::Residency::Method::kProbe:
      finding.value = "single pages";
      break;
    case internal::Residency::Method::kNone:
      finding.value = "unknown";
      break;
  }
  if (!finding.limit.empty()) finding.cure = "Linux 6.5, and files that the reader owns or may write";
  return finding;
}

// Makes an unnamed file of one block in `directory`. Empty, with errno set, if that fails.
internal::UniqueFd nameless_file(const fs::path& directory) {
  internal::UniqueFd fd(::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!fd && (errno == EOPNOTSUPP || errno == EISDIR)) {
    std::string name = directory / ".flashpack-probe-XXXXXX";
    fd.reset(::mkostemp(name.data(), O_CLOEXEC));
    if (fd) ::unlink(name.c_str());
  }
  const std::string block(4096, '\0');
  if (fd && ::pwrite(fd.get(), block.data(), block.size(), 0) < 0) fd.reset();
  return fd;
}

void add_path(std::vector<Finding>& findings, const fs::path& path, const internal::Staging& staging) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) throw internal::file_error(error ? error : errno_code(ENOENT), "probe", path);
  findings.push_back(file_system(path));
  internal::UniqueFd nameless;
  fs::path tried = path;
  if (fs::is_directory(status)) {
    nameless = nameless_file(path);
    if (!nameless) {
      const std::string limit = errno_code(errno).message() + ": no file can be made here, so nothing was tried";
      findings.push_back({.key = "direct_io", .value = "unknown", .limit = limit, .cure = "give the path of a file"});
      return;
    }
    tried = "/proc/self/fd/" + std::to_string(nameless.get());
  }
  const internal::File file = internal::File::open(tried, std::nullopt, true);
  findings.push_back(direct_io(file, staging));
  findings.push_back(residency(file));
}

}  // namespace

std::vector<Finding> probe(const std::filesystem::path& path) {
  const internal::Staging staging(2 * kSlotBytes, kSlotBytes);
  std::vector<Finding> findings{kernel(), cpus(), seccomp()};
  add_ring(findings, staging);
  findings.push_back(locked_memory());
  findings.push_back(huge_pages(staging));
  findings.push_back(numa());
  findings.push_back(gpus());
  if (!path.empty()) add_path(findings, path, staging);
  return findings;
}

}  // namespace flashpack
