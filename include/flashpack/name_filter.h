#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace flashpack {

/// A set of tensor names: those listed, and those that begin or end as listed. Default: none.
struct NameFilter {
  std::vector<std::string> names;
  std::vector<std::string> prefixes;
  std::vector<std::string> suffixes;

  bool matches(std::string_view name) const noexcept;
};

}  // namespace flashpack
