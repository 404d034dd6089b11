#include "engine/ground/stream_copy.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <vector>

#include "tests/support/bulk.h"

namespace flashpack::internal {
namespace {

TEST(StreamCopyTest, CopiesAllBytesAndNoOthersWhateverTheAddressesAndSizes) {
  constexpr std::size_t kLarge = 64 << 10;
  constexpr std::byte kUntouched{0xA5};
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, kLarge - 1, kLarge, kLarge + 63, 3 * kLarge + 17}) {
    for (const std::size_t from_shift : {0u, 1u, 63u}) {
      for (const std::size_t to_shift : {0u, 1u, 16u, 63u, 64u}) {
        std::vector<std::byte> from(size + 128);
        testing::fill_with_random_bytes(from.data(), from.size(), size);
        std::vector<std::byte> to(size + 192, kUntouched);
        stream_copy(to.data() + to_shift, from.data() + from_shift, size);
        ASSERT_TRUE(testing::same_bytes(to.data() + to_shift, from.data() + from_shift, size));
        ASSERT_TRUE(testing::all_bytes_are(kUntouched, to.data(), to_shift));
        ASSERT_TRUE(testing::all_bytes_are(kUntouched, to.data() + to_shift + size, to.size() - to_shift - size));
      }
    }
  }
}

}  // namespace
}  // namespace flashpack::internal
