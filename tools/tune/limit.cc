#include "tools/tune/limit.h"

#include <cstdio>

namespace flashpack::bench {

std::string limit_of(const Cell& best, const char* otherwise, const Ceilings& ceilings) {
  constexpr double kNear = 0.85;
  constexpr double kNearDisk = 0.9;  // Nearer than for memory and GPUs, on whose way an engine loses more.
  char text[160];
  const double busy = best.cpu_s_per_gb * best.gb_per_s;
  if (ceilings.link > 0 && best.gb_per_s > kNear * ceilings.link) {
    std::snprintf(text, sizeof text, "link: copies of page-locked memory to the GPU reach %.1f GB/s", ceilings.link);
  } else if (ceilings.copies > 0 && best.gb_per_s > kNear * ceilings.copies) {
    std::snprintf(text, sizeof text, "memory: plain copies by all cores reach %.1f GB/s", ceilings.copies);
  } else if (ceilings.disk > 0 && best.gb_per_s > kNearDisk * ceilings.disk) {
    std::snprintf(text, sizeof text, "disk: its plain %s reach %.2f GB/s", ceilings.plain, ceilings.disk);
  } else if (busy > 0.8 * ceilings.cores || ceilings.disk <= 0) {
    std::snprintf(text, sizeof text, "%s: %.1f of %g cores were busy", busy > 0.8 * ceilings.cores ? "CPU" : otherwise,
                  busy, ceilings.cores);
  } else {
    std::snprintf(text, sizeof text, "not the disk, whose plain %s reach %.2f GB/s: %.1f of %g cores were busy",
                  ceilings.plain, ceilings.disk, busy, ceilings.cores);
  }
  return text;
}

}  // namespace flashpack::bench
