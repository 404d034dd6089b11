#include "engine/stripe_sums.h"

#include <isa-l/crc.h>

#include <algorithm>
#include <array>
#include <bit>

namespace flashpack::internal {

namespace {

constexpr std::uint32_t kStripeBytes = Checksums::kStripeBytes;

// Numbers here are polynomials over GF(2) modulo the polynomial of CRC-32C. The highest bit is the coefficient of x^0,
// as in the CRC itself.
constexpr std::uint32_t kOne = std::uint32_t{1} << 31;
constexpr std::uint32_t kPolynomial = 0x82F63B78;
constexpr std::uint32_t kOrder = 0x7FFFFFFF;  // x to this power is 1.

constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (; a != 0; a <<= 1) {
    if (a & kOne) product ^= b;
    b = (b >> 1) ^ ((b & 1) ? kPolynomial : 0);
  }
  return product;
}

// x to the powers 1, 2, 4, 8, ...
constexpr std::array<std::uint32_t, 31> kSquares = [] {
  std::array<std::uint32_t, 31> squares{};
  squares[0] = kOne >> 1;
  for (std::size_t i = 1; i < squares.size(); ++i) squares[i] = multiply(squares[i - 1], squares[i - 1]);
  return squares;
}();

constexpr std::uint32_t power_of_x(std::uint32_t exponent) {
  std::uint32_t power = kOne;
  for (; exponent != 0; exponent &= exponent - 1) {
    power = multiply(power, kSquares[static_cast<std::size_t>(std::countr_zero(exponent))]);
  }
  return power;
}

static_assert(multiply(power_of_x(kOrder - 8), power_of_x(8)) == kOne);

// The remainder of the same bytes with `size_bytes` zero bytes more, or less, at the end.
std::uint32_t append_zeros(std::uint32_t sum, std::uint32_t size_bytes) {
  return size_bytes == 0 ? sum : multiply(sum, power_of_x(8 * size_bytes));
}
std::uint32_t remove_zeros(std::uint32_t sum, std::uint32_t size_bytes) {
  return size_bytes == 0 ? sum : multiply(sum, power_of_x(kOrder - 8 * size_bytes));
}

std::uint32_t remainder(std::span<const std::byte> bytes, std::uint32_t before = 0) {
  // The library takes a pointer to mutable bytes but only reads, and takes the size as an int.
  auto* const begin = const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(bytes.data()));
  return ::crc32_iscsi(begin, static_cast<int>(bytes.size()), before);
}

}  // namespace

StripeSums::StripeSums(std::uint64_t begin_bytes, std::uint64_t end_bytes) : end_bytes_(end_bytes) {
  if (begin_bytes < end_bytes) grow(begin_bytes / kStripeBytes, (end_bytes - 1) / kStripeBytes + 1);
}

void StripeSums::count(std::uint64_t offset_bytes, std::span<const std::byte> bytes, Change change) noexcept {
  if (offset_bytes >= end_bytes_) return;
  bytes = bytes.first(std::min<std::uint64_t>(bytes.size(), end_bytes_ - offset_bytes));
  while (!bytes.empty()) {
    const std::uint64_t index = offset_bytes / kStripeBytes;
    const auto begin = static_cast<std::uint32_t>(offset_bytes % kStripeBytes);
    const auto size = static_cast<std::uint32_t>(std::min<std::uint64_t>(kStripeBytes - begin, bytes.size()));
    if (find(index)) {
      Stripe& stripe = stripes_[index - first_];
      // The sum of a value with itself is zero, so that the second time takes back the first.
      stripe.sum.fetch_xor(append_zeros(remainder(bytes.first(size)), kStripeBytes - begin - size),
                           std::memory_order_relaxed);
      if (change == Change::kAdd) {
        stripe.counted_bytes.fetch_add(size, std::memory_order_relaxed);
      } else {
        stripe.counted_bytes.fetch_sub(size, std::memory_order_relaxed);
      }
    }
    offset_bytes += size;
    bytes = bytes.subspan(size);
  }
}

void StripeSums::add(const StripeSums& other) {
  grow(other.first_, other.end_);
  end_bytes_ = std::max(end_bytes_, other.end_bytes_);
  for (std::uint64_t index = other.first_; index < other.end_; ++index) {
    Stripe& stripe = stripes_[index - first_];
    const Stripe& its = other.stripes_[index - other.first_];
    stripe.sum ^= its.sum;
    stripe.counted_bytes += its.counted_bytes;
  }
}

std::uint32_t StripeSums::crc32c(std::uint64_t index, std::uint32_t size_bytes) const noexcept {
  const Stripe* const stripe = find(index);
  const std::uint32_t sum = stripe ? remove_zeros(stripe->sum, kStripeBytes - size_bytes) : 0;
  // The standard inverts the first four bytes and the result.
  return sum ^ append_zeros(~std::uint32_t{0}, size_bytes) ^ ~std::uint32_t{0};
}

std::uint32_t StripeSums::counted_bytes(std::uint64_t index) const noexcept {
  const Stripe* const stripe = find(index);
  return stripe ? stripe->counted_bytes.load() : 0;
}

const StripeSums::Stripe* StripeSums::find(std::uint64_t index) const noexcept {
  return index >= first_ && index < end_ ? &stripes_[index - first_] : nullptr;
}

void StripeSums::grow(std::uint64_t first, std::uint64_t end) {
  if (first == end) return;
  if (stripes_.empty()) first_ = end_ = first;
  for (; first_ > first; --first_) stripes_.emplace_front();
  for (; end_ < end; ++end_) stripes_.emplace_back();
}

}  // namespace flashpack::internal

std::uint32_t flashpack::crc32c(std::span<const std::byte> bytes) noexcept {
  std::uint32_t sum = ~std::uint32_t{0};
  for (; !bytes.empty(); bytes = bytes.subspan(std::min<std::size_t>(bytes.size(), Checksums::kStripeBytes))) {
    sum = internal::remainder(bytes.first(std::min<std::size_t>(bytes.size(), Checksums::kStripeBytes)), sum);
  }
  return ~sum;
}
