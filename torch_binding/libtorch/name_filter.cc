#include <algorithm>

#include "flashpack/name_filter.h"

namespace flashpack {

bool NameFilter::matches(std::string_view name) const noexcept {
  return std::ranges::any_of(names, [&](std::string_view each) { return name == each; }) ||
         std::ranges::any_of(prefixes, [&](std::string_view each) { return name.starts_with(each); }) ||
         std::ranges::any_of(suffixes, [&](std::string_view each) { return name.ends_with(each); });
}

}  // namespace flashpack
