#include "engine/stripe_sums.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string_view>
#include <thread>
#include <vector>

#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

constexpr std::uint32_t kStripe = Checksums::kStripeBytes;

// Bit by bit, as the standard says it.
std::uint32_t crc32c(std::span<const std::byte> bytes) {
  std::uint32_t crc = ~std::uint32_t{0};
  for (const std::byte byte : bytes) {
    crc ^= std::to_integer<std::uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78 : 0);
  }
  return ~crc;
}

TEST(StripeSums, IsTheCrcOfTheStandard) {
  const std::string_view check = "123456789";
  StripeSums sums(0, check.size());
  sums.add(0, std::as_bytes(std::span(check)));
  EXPECT_EQ(sums.crc32c(0, 9), 0xE3069283);  // Its published check value.
  const std::vector<std::byte> zeros(32);
  EXPECT_EQ(StripeSums(0, 32).crc32c(0, 32), 0x8A9136AA) << "32 zeros, RFC 3720 B.4: they need not be added";
  EXPECT_EQ(crc32c(zeros), 0x8A9136AA);
}

TEST(StripeSums, PartsInAnyOrderFromManyThreadsMakeTheSame) {
  const auto bytes = flashpack::testing::random_bytes(3 * kStripe + 12'345);
  std::mt19937 random(1);
  std::vector<std::size_t> cuts{0, 1, kStripe - 1, kStripe, 2 * kStripe + 7, bytes.size()};
  for (int i = 0; i < 50; ++i) cuts.push_back(random() % bytes.size());
  std::sort(cuts.begin(), cuts.end());
  std::vector<std::size_t> parts;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) parts.push_back(i);
  std::shuffle(parts.begin(), parts.end(), random);
  StripeSums sums(0, bytes.size());
  std::vector<std::thread> threads;
  for (std::size_t thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&, thread] {
      for (std::size_t i = thread; i < parts.size(); i += 3) {
        const std::size_t begin = cuts[parts[i]];
        sums.add(begin, std::span(bytes).subspan(begin, cuts[parts[i] + 1] - begin));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::uint64_t index = 0; index < 4; ++index) {
    const auto stripe = std::span(bytes).subspan(index * kStripe).first(index < 3 ? kStripe : 12'345);
    EXPECT_EQ(sums.counted_bytes(index), stripe.size());
    EXPECT_EQ(sums.crc32c(index, static_cast<std::uint32_t>(stripe.size())), crc32c(stripe)) << index;
  }
}

TEST(StripeSums, WhatIsTakenBackWasNeverCountedWhateverTheParts) {
  const auto bytes = flashpack::testing::random_bytes(3 * kStripe);
  StripeSums sums(0, bytes.size());
  const auto part = [&](std::uint64_t begin, std::uint64_t end) {
    return std::span(bytes).subspan(begin, end - begin);
  };
  sums.add(0, part(0, kStripe));
  for (const std::uint64_t begin : {kStripe + 5ull, kStripe + 900ull, kStripe + 70'000ull})
    sums.add(begin, part(begin, begin + 100));
  sums.add(kStripe + 1000, part(kStripe + 1000, 2 * kStripe + 33));
  sums.take_back(kStripe + 5, part(kStripe + 5, kStripe + 105));
  sums.take_back(kStripe + 900, part(kStripe + 900, kStripe + 1500));
  sums.take_back(kStripe + 1500, part(kStripe + 1500, 2 * kStripe + 33));
  sums.take_back(kStripe + 70'000, part(kStripe + 70'000, kStripe + 70'100));
  EXPECT_EQ(sums.counted_bytes(0), kStripe);
  EXPECT_EQ(sums.counted_bytes(1), 0u);
  EXPECT_EQ(sums.counted_bytes(2), 0u);
  sums.add(kStripe, part(kStripe, 3 * kStripe));
  for (std::uint64_t index = 0; index < 3; ++index)
    EXPECT_EQ(sums.crc32c(index, kStripe), crc32c(part(index * kStripe, (index + 1) * kStripe))) << index;
}

TEST(StripeSums, RangesAreJoinedAndWhatLiesOutsideIsPassedOver) {
  const auto bytes = flashpack::testing::random_bytes(4 * kStripe);
  StripeSums first(0, 2 * kStripe);
  first.add(0, bytes);  // Stripes 2 and 3 are not its own.
  StripeSums second(2 * kStripe, 3 * kStripe);
  second.add(2 * kStripe, std::span(bytes).subspan(2 * kStripe, kStripe));
  StripeSums all;
  all.add(second);
  all.add(first);
  all.add(StripeSums());
  for (std::uint64_t index = 0; index < 3; ++index) {
    EXPECT_EQ(all.crc32c(index, kStripe), crc32c(std::span(bytes).subspan(index * kStripe, kStripe))) << index;
  }
  EXPECT_EQ(all.counted_bytes(3), 0u);
}

TEST(StripeSums, WhatLiesPastTheEndIsPassedOverInTheLastStripeToo) {
  const auto bytes = flashpack::testing::random_bytes(kStripe);
  StripeSums sums(0, 1000);
  sums.add(0, std::span(bytes).first(900));
  sums.add(900, std::span(bytes).subspan(900));
  sums.add(2000, bytes);
  EXPECT_EQ(sums.counted_bytes(0), 1000u);
  EXPECT_EQ(sums.crc32c(0, 1000), crc32c(std::span(bytes).first(1000)));
}

}  // namespace
}  // namespace flashpack::internal
