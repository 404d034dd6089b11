/// Recognises files that are no checkpoints, so that errors can say what they are and what to do about it.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace flashpack {

/// Bytes at the beginning of a file in which what_it_is() finds all that it looks for.
inline constexpr std::size_t kForeignHeadBytes = 512;

/// Says what a file that begins with `head` is, and the cure: "it is a pointer of git-lfs, and ...". Empty if it is
/// none of the files that people mistake for checkpoints. `head` may be longer than kForeignHeadBytes, and is all of a
/// file that is shorter.
std::string what_it_is(std::string_view head);

}  // namespace flashpack
