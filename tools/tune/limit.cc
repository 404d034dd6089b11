#include "tools/tune/limit.h"

#include <cstdio>

namespace flashpack::bench {

std::string limit_of(const Cell& best, const char* otherwise, const Ceilings& ceilings) {
  constexpr double kNear = 0.85;
  char text[160];
  const double busy = best.cpu_s_per_gb * best.gb_per_s;
  if (ceilings.link > 0 && best.gb_per_s > kNear * ceilings.link) {
    std::snprintf(text, sizeof text, "link: copies of page-locked memory to the GPU reach %.1f GB/s", ceilings.link);
  } else if (ceilings.copies > 0 && best.gb_per_s > kNear * ceilings.copies) {
    std::snprintf(text, sizeof text, "memory: plain copies by all cores reach %.1f GB/s", ceilings.copies);
  } else {
    std::snprintf(text, sizeof text, "%s: %.1f of %u cores were busy", busy > 0.8 * ceilings.cores ? "CPU" : otherwise,
                  busy, ceilings.cores);
  }
  return text;
}

}  // namespace flashpack::bench
