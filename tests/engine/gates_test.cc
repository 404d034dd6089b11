// Transfers to a device wait behind the gate of their caller's stream, with a slot or without one.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/pipeline_rig.h"
#include "tests/support/temp_dir.h"
#include "tests/support/wait_until.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::GuardedMemory;
using flashpack::testing::kHang;
using Rig = flashpack::testing::PipelineRig;

constexpr std::uint32_t kChunk = 1u << 20;
constexpr std::size_t kSlots = 4;  // Two of them are kept from those behind a shut gate.

// A device whose memory is the host's, and whose copies land at once.
class HostCopier final : public Copier {
 public:
  void push(unsigned tag, unsigned, const ByteWork& work) override {
    carry_out(work);
    landed_.push_back({tag, {}});
  }
  std::span<const EndedCopy> poll() override {
    polled_.clear();
    polled_.swap(landed_);
    return polled_;
  }
  bool idle() const noexcept override { return landed_.empty(); }
  std::unique_ptr<Gate> gate(DeviceNumber device, CUstream_st* stream) override;
  DeviceNumber device_of(const void* memory) const override { return memory >= second_device ? 2 : 1; }
  DeviceNumber devices() const noexcept override { return 2; }
  bool locked() const noexcept override { return true; }
  std::string fallback_reason() const override { return {}; }

  // Memory from here on is on a device of its own.
  const void* second_device = reinterpret_cast<const void*>(~std::uintptr_t{0});

 private:
  std::vector<EndedCopy> landed_;
  std::vector<EndedCopy> polled_;
};

// What the caller's stream does.
struct Stream {
  std::atomic<int> error = 0;
  std::atomic<bool> at_end = false;
  std::atomic<int> looks = 0;
};

struct OpenGate final : Gate {
  bool is_open(std::error_code&) noexcept override { return true; }
};

class StreamGate final : public Gate {
 public:
  explicit StreamGate(Stream& stream) : stream_(stream) {}
  bool is_open(std::error_code& error) noexcept override {
    ++stream_.looks;
    if (stream_.error != 0) error = {stream_.error, std::generic_category()};
    return stream_.error != 0 || stream_.at_end;
  }

 private:
  Stream& stream_;
};

std::unique_ptr<Gate> HostCopier::gate(DeviceNumber, CUstream_st* stream) {
  if (!stream) return std::make_unique<OpenGate>();
  return std::make_unique<StreamGate>(*reinterpret_cast<Stream*>(stream));
}

class PipelineGateTest : public ::testing::Test {
 protected:
  PipelineGateTest() { flashpack::testing::write_file(path_, bytes_); }

  Transfer start_behind(Stream& stream, GuardedMemory& target) {
    return rig_.start({.path = path_,
                       .extents = {{0, target.size(), target.data()}},
                       .stream = reinterpret_cast<CUstream_st*>(&stream)});
  }

  /// The second chunk of `target`, which has two, is on a second device.
  Transfer start_behind_both(Stream& one, Stream& two, GuardedMemory& target) {
    copier_.second_device = target.data() + kChunk;
    return rig_.start_request(
        {.files = {{.path = path_, .extents = {{0, kChunk, target.data()}, {kChunk, kChunk, target.data() + kChunk}}}},
         .stream = reinterpret_cast<CUstream_st*>(&one),
         .more_streams = {reinterpret_cast<CUstream_st*>(&two)}});
  }

  static void wait_for_looks(const Stream& stream) {
    const int first = stream.looks;
    flashpack::testing::wait_until([&] { return stream.looks >= first + 3; });
  }

  flashpack::testing::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "file";
  const std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(6 * kChunk);
  HostCopier copier_;
  Rig rig_{1, {}, Rig::Shape::kRealWorkers, kChunk, kSlots, &copier_};
};

TEST_F(PipelineGateTest, AGateThatFailsEndsAlsoTheTransferThatFoundNoSlot) {
  Stream stream;
  GuardedMemory first_target(3 * kChunk);
  GuardedMemory second_target(3 * kChunk);
  Transfer first = start_behind(stream, first_target);  // Takes as many slots as it may.
  wait_for_looks(stream);
  Transfer second = start_behind(stream, second_target);
  wait_for_looks(stream);
  stream.error = EIO;
  for (Transfer* transfer : {&first, &second}) {
    ASSERT_TRUE(transfer->wait_for(kHang)) << "it hangs";
    EXPECT_THROW(transfer->wait(), Error);
  }
}

TEST_F(PipelineGateTest, AGateOpensAlsoForTheTransferThatStuckReadsLeaveNoSlot) {
  rig_.disk().get_stuck_from(4 * kChunk);
  GuardedMemory stuck_target(2 * kChunk, 1);  // Out of phase: through slots.
  Transfer stuck = rig_.start({.path = path_, .extents = {{4 * kChunk, stuck_target.size(), stuck_target.data()}}});
  flashpack::testing::wait_until([&] { return stuck.progress().outstanding >= 2; });
  stuck.cancel();

  Stream stream;
  GuardedMemory target(3 * kChunk);
  Transfer transfer = start_behind(stream, target);
  wait_for_looks(stream);
  stream.at_end = true;
  EXPECT_TRUE(transfer.wait_for(kHang)) << "it hangs";
  EXPECT_FALSE(stuck.wait_for(std::chrono::nanoseconds(0)));
  rig_.disk().get_stuck_from(~std::uint64_t{0});
  ASSERT_TRUE(transfer.wait_for(kHang));
  transfer.wait();
  EXPECT_TRUE(testing::same_bytes(target.data(), bytes_.data(), target.size()));
  ASSERT_TRUE(stuck.wait_for(kHang));
}

TEST_F(PipelineGateTest, AFileThatFailsGivesItsSlotsBackThoughItsGateIsShut) {
  rig_.get_stuck_from(4 * kChunk);
  Stream stream;
  GuardedMemory target(2 * kChunk);
  LoadRequest request{
      .files = {{.path = path_, .extents = {{0, kChunk, target.data()}, {4 * kChunk, kChunk, target.data() + kChunk}}}},
      .cache = CachePolicy::kDirect,
      .stream = reinterpret_cast<CUstream_st*>(&stream),
      .continue_on_error = true};
  Transfer transfer = rig_.start_request(request);
  flashpack::testing::wait_until([&] { return transfer.progress().outstanding >= 2; });
  wait_for_looks(stream);  // The first chunk waits for the gate, the second one for the disk.
  rig_.fail_at(4 * kChunk);
  rig_.get_stuck_from(bytes_.size());
  ASSERT_TRUE(transfer.wait_for(kHang)) << "it hangs";
  EXPECT_EQ(transfer.error(), std::errc::io_error);
  rig_.fail_at(bytes_.size());
  request.stream = nullptr;
  Transfer again = rig_.start_request(request);
  ASSERT_TRUE(again.wait_for(kHang));
  EXPECT_FALSE(again.error()) << again.error_text();
}

TEST_F(PipelineGateTest, NothingIsCopiedBeforeTheGatesOfAllDevicesAreOpen) {
  GuardedMemory target(2 * kChunk);
  for (const bool first_opens_first : {true, false}) {
    SCOPED_TRACE(first_opens_first);
    std::fill_n(target.data(), target.size(), std::byte{});
    Stream one;
    Stream two;
    Transfer transfer = start_behind_both(one, two, target);
    Stream& earlier = first_opens_first ? one : two;
    Stream& later = first_opens_first ? two : one;
    earlier.at_end = true;
    flashpack::testing::wait_until([&] { return earlier.looks > 0; });
    wait_for_looks(later);
    EXPECT_LE(earlier.looks, later.looks) << "a gate that has opened is looked at no more";
    EXPECT_TRUE(flashpack::testing::all_bytes_are(std::byte{}, target.data(), target.size()));
    later.at_end = true;
    ASSERT_TRUE(transfer.wait_for(kHang)) << "it hangs";
    transfer.wait();
    EXPECT_TRUE(testing::same_bytes(target.data(), bytes_.data(), target.size()));
  }
}

TEST_F(PipelineGateTest, OneGateThatFailsEndsTheTransferThoughTheOtherIsShut) {
  GuardedMemory target(2 * kChunk);
  for (const bool first_fails : {true, false}) {
    Stream one;
    Stream two;
    Transfer transfer = start_behind_both(one, two, target);
    wait_for_looks(one);
    wait_for_looks(two);
    (first_fails ? one : two).error = EIO;
    ASSERT_TRUE(transfer.wait_for(kHang)) << "it hangs";
    EXPECT_EQ(transfer.error(), std::errc::io_error);
  }
}

// Each look costs the driver a turn; what is between them is sleep, and the sum of it a lower bound of what passes.
TEST_F(PipelineGateTest, AGateThatStaysShutIsLookedAtLessAndLess) {
  constexpr int kLooks = 200;
  constexpr std::chrono::microseconds kShortestSleep{100};
  Stream stream;
  GuardedMemory target(3 * kChunk);
  const auto begin = std::chrono::steady_clock::now();
  Transfer transfer = start_behind(stream, target);
  while (stream.looks < kLooks) std::this_thread::sleep_for(kShortestSleep);
  EXPECT_GT(std::chrono::steady_clock::now() - begin, 10 * kLooks * kShortestSleep);
  stream.at_end = true;
  ASSERT_TRUE(transfer.wait_for(kHang)) << "it hangs";
  transfer.wait();
  EXPECT_TRUE(testing::same_bytes(target.data(), bytes_.data(), target.size()));
}

}  // namespace
}  // namespace flashpack::internal
