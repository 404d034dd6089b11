#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

/// What faulty_fs and those who read its files agree on.
namespace flashpack::testing::faulty_fs {

inline constexpr std::uint64_t kFileBytes = (6u << 20) + 777;
/// Where /eio fails and /early ends.
inline constexpr std::uint64_t kBadOffset = (4u << 20) + 8192;
/// From here on /stuck gets stuck.
inline constexpr std::uint64_t kStuckOffset = 2u << 20;
inline constexpr std::array<std::string_view, 9> kNames = {"plain", "eio",   "short",    "eintr", "eagain",
                                                           "early", "stuck", "changing", "lost"};

inline std::byte byte_at(std::uint64_t offset) { return static_cast<std::byte>((offset * 0x9E3779B97F4A7C15u) >> 56); }

}  // namespace flashpack::testing::faulty_fs
