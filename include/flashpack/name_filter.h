/// A choice of tensors by their names.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace flashpack {

/// Matches a name that is listed, or that begins or ends as listed. The default matches no name. Thread
/// safety: as a standard container.
struct NameFilter {
  std::vector<std::string> names;
  std::vector<std::string> prefixes;
  std::vector<std::string> suffixes;

  bool matches(std::string_view name) const noexcept;
};

}  // namespace flashpack
