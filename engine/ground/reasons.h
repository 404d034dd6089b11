/// Text that says why something is slower than asked for.
///
/// Thread safety: the text belongs to one thread at a time.
#pragma once

#include <string>
#include <string_view>

namespace flashpack::internal {

/// Adds `reason`, joined by "; ", to all the others, unless it is empty or already in `all`.
inline void add_reason(std::string& all, std::string_view reason) {
  if (reason.empty() || all.find(reason) != std::string::npos) return;
  all.append(all.empty() ? "" : "; ").append(reason);
}

}  // namespace flashpack::internal
