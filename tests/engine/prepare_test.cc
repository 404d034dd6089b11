#include "engine/prepare.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

constexpr std::uint32_t kChunk = 1u << 20;

// Two devices, whose memory is everything from kDevice on.
class HalfCopier final : public Copier {
 public:
  static constexpr std::uintptr_t kDevice = std::uintptr_t{1} << 40;
  static constexpr std::uintptr_t kSecond = kDevice + (std::uintptr_t{1} << 39);
  static constexpr std::uintptr_t kElsewhere = std::uintptr_t{1} << 41;

  void push(unsigned, unsigned, const ByteWork&) override {}
  std::span<const EndedCopy> poll() override { return {}; }
  bool idle() const noexcept override { return true; }
  std::unique_ptr<Gate> gate(DeviceNumber device, CUstream_st* stream) override {
    if (!stream) throw Error(Errc::kInvalidArgument, "captured");
    gates.emplace_back(device, stream);
    return std::make_unique<OpenGate>();
  }
  DeviceNumber device_of(const void* memory) const override {
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    if (address >= kElsewhere) throw std::system_error(EIO, std::generic_category(), "device");
    if (address >= kSecond) return 2;
    return address >= kDevice ? 1 : kHost;
  }
  DeviceNumber devices() const noexcept override { return 2; }
  bool locked() const noexcept override { return true; }
  std::string fallback_reason() const override { return {}; }

  std::vector<std::pair<DeviceNumber, CUstream_st*>> gates;  // All that have been made.

 private:
  struct OpenGate final : Gate {
    bool is_open(std::error_code&) noexcept override { return true; }
  };
};

std::byte* at(std::uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

// The message of the Error that `call` throws.
template <typename Call>
std::string message_of(Call call) {
  try {
    call();
    return {};
  } catch (const Error& error) {
    return error.what();
  }
}

class PrepareTest : public ::testing::Test {
 protected:
  StoreTarget target(bool checksums = true) {
    UniqueFd fd(::open((dir_ / "new").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    return {"the file", FileUse(File::created(dir_ / "new", std::move(fd)), nullptr), checksums};
  }

  std::shared_ptr<TransferState> store(const WriteRequest& request) {
    return prepare_store(engine_, target(), request, extents_of(engine_, request, "the file"), nullptr);
  }

  flashpack::testing::TempDir dir_;
  HalfCopier copier_;
  const EngineFacts engine_{.chunk_bytes = kChunk,
                            .backend = Backend::kWorkers,
                            .copier = &copier_,
                            .fallback_reason = "memory: small pages"};
};

TEST_F(PrepareTest, ExtentsAreNumberedAsInTheRequest) {
  const auto load =
      prepare_load(engine_,
                   {.files = {{.path = "a", .extents = {{0, 5, at(4096)}, {9, 0, nullptr}, {5, 5, at(8192), 6}}},
                              {.path = "b", .extents = {}},
                              {.path = "c", .extents = {{7, 3, at(100)}}}}},
                   nullptr);
  ASSERT_EQ(load->driver.parts.size(), 3u);
  ASSERT_EQ(load->driver.parts[0].request.extents.size(), 2u) << "one of no bytes is nothing to read";
  EXPECT_EQ(load->driver.parts[0].request.extents[0].extent, 0u);
  EXPECT_EQ(load->driver.parts[0].request.extents[1].extent, 2u);
  EXPECT_EQ(load->driver.parts[0].request.extents[1].priority, 6u);
  EXPECT_EQ(load->driver.parts[0].request.reported_extents, 0u) << "nobody wants to know";
  ASSERT_EQ(load->driver.parts[2].request.extents.size(), 1u);
  EXPECT_EQ(load->driver.parts[2].request.extents[0].extent, 0u);
  EXPECT_EQ(load->driver.parts[2].request.index, 2u);
  EXPECT_EQ(load->request.total_bytes, 13u);
}

TEST_F(PrepareTest, BothDirectionsAreToldAboutTheirEngine) {
  for (const auto& transfer :
       {prepare_load(engine_, {.files = {{.path = "a", .extents = {{0, 5, at(4096)}}}}}, nullptr),
        store({.extents = {{0, 5, at(4096)}}})}) {
    EXPECT_EQ(transfer->driver.stats.requested_bytes, 5u);
    EXPECT_EQ(transfer->driver.stats.backend, Backend::kWorkers);
    EXPECT_EQ(transfer->driver.stats.fallback_reason, "memory: small pages");
    EXPECT_TRUE(transfer->driver.stats.pinned);
    EXPECT_TRUE(transfer->driver.gates.empty()) << "nothing of it is on a device";
  }
}

TEST_F(PrepareTest, WhatCudaSaysOfTheStreamIsThrownInBothDirections) {
  const std::uintptr_t device = HalfCopier::kDevice;
  EXPECT_EQ(message_of([&] {
              prepare_load(engine_, {.files = {{.path = "a"}, {.path = "b", .extents = {{0, 5, at(device)}}}}},
                           nullptr);
            }),
            "captured: invalid argument");
  EXPECT_EQ(message_of([&] { store({.extents = {{0, 5, at(4096)}, {5, 5, at(device)}}}); }),
            "captured: invalid argument");
}

TEST_F(PrepareTest, EachDeviceWithMemoryOfTheRequestHasAGateOfItsOwnStream) {
  using Gates = std::vector<std::pair<DeviceNumber, CUstream_st*>>;
  const std::uintptr_t first = HalfCopier::kDevice;
  const std::uintptr_t second = HalfCopier::kSecond;
  auto* const one = reinterpret_cast<CUstream_st*>(1);
  auto* const two = reinterpret_cast<CUstream_st*>(2);
  const auto gates_of = [&](std::vector<std::uintptr_t> places) {
    LoadRequest load{.stream = one, .more_streams = {two}};
    WriteRequest write{.stream = one, .more_streams = {two}};
    for (std::uint64_t i = 0; i < places.size(); ++i) {
      load.files.push_back({.path = "a", .extents = {{10 * i, 5, at(places[i] + 10 * i)}}});
      write.extents.push_back({10 * i, 5, at(places[i] + 10 * i)});
    }
    copier_.gates.clear();
    const auto stored = store(write);
    EXPECT_EQ(stored->driver.gates.size(), copier_.gates.size());
    const Gates of_store = std::exchange(copier_.gates, {});
    const auto loaded = prepare_load(engine_, load, nullptr);
    EXPECT_EQ(loaded->driver.gates.size(), copier_.gates.size());
    EXPECT_EQ(copier_.gates, of_store);
    return copier_.gates;
  };
  EXPECT_EQ(gates_of({first, 4096, first}), (Gates{{1, one}}));
  EXPECT_EQ(gates_of({second, 4096}), (Gates{{2, two}}));
  EXPECT_EQ(gates_of({4096, second, first, second}), (Gates{{1, one}, {2, two}}));
}

TEST_F(PrepareTest, AStreamThatIsMissingIsTheDefaultStreamAndOneTooManyAnError) {
  const std::uintptr_t second = HalfCopier::kSecond;
  auto* const stream = reinterpret_cast<CUstream_st*>(1);
  EXPECT_EQ(message_of([&] { store({.extents = {{0, 5, at(second)}}, .stream = stream}); }),
            "captured: invalid argument")
      << "it is asked for the default stream of the second device";
  EXPECT_EQ(message_of([&] { store({.more_streams = {stream, stream}}); }),
            "write the file: more_streams than more_devices: invalid argument");
  EXPECT_EQ(message_of([&] { prepare_load(engine_, {.more_streams = {stream, stream}}, nullptr); }),
            "load: more_streams than more_devices: invalid argument");
  EXPECT_EQ(message_of([&] { prepare_load({.chunk_bytes = kChunk}, {.more_streams = {stream}}, nullptr); }),
            "load: more_streams than more_devices: invalid argument");
}

TEST_F(PrepareTest, WhatCudaSaysOfMemoryIsTheFailureOfALoadAndRefusesAStore) {
  const std::uintptr_t elsewhere = HalfCopier::kElsewhere;
  const std::string message = "start transfer: device: Input/output error";
  const auto load = prepare_load(engine_, {.files = {{.path = "a", .extents = {{0, 5, at(elsewhere)}}}}}, nullptr);
  const PartResult* const result = load->driver.parts.front().handover.result();
  ASSERT_TRUE(result && result->failure);
  EXPECT_EQ(result->failure->error().what(), message);
  EXPECT_EQ(message_of([&] { store({.extents = {{0, 5, at(elsewhere)}}}); }), message);
}

TEST_F(PrepareTest, AStoreIsPlannedInFileOrderOnBothSides) {
  const auto transfer = store(
      {.extents = {{2 * kChunk, 10, at(4096)}, {0, kChunk, at(kChunk)}, {kChunk, 0, nullptr}, {kChunk, 20, at(64)}},
       .deadline = Deadline()});
  EXPECT_EQ(transfer->request.deadline, Deadline());
  const Part& part = transfer->driver.parts.front();
  EXPECT_EQ(part.request.path, "the file");
  ASSERT_TRUE(part.planned->sums);
  EXPECT_FALSE(part.planned->router.exhausted());
  std::vector<std::uint32_t> extents;
  for (const Fragment& fragment : part.plan().fragments) extents.push_back(fragment.extent);
  EXPECT_EQ(extents, (std::vector<std::uint32_t>{1, 3, 0}));
}

TEST_F(PrepareTest, AStoreOfNothingHasNothingToDo) {
  const auto transfer = store({});
  EXPECT_TRUE(transfer->driver.parts.front().planned->router.exhausted());
  EXPECT_FALSE(transfer->driver.parts.front().planned->sums);
}

TEST_F(PrepareTest, OnlyChecksumsOfStripesThatAreWantedAreCopied) {
  constexpr std::uint64_t kStripe = Checksums::kStripeBytes;
  const Checksums all{.size_bytes = 5 * kStripe - 1, .crc32c = {10, 11, 12, 13, 14}};
  const auto kept = [&](std::vector<Extent> extents) {
    const auto load = prepare_load(engine_, {.files = {{.path = "a", .extents = extents, .checksums = &all}}}, nullptr);
    const WantedChecksums& wanted = *load->driver.parts.front().request.checksums;
    EXPECT_EQ(wanted.payload_bytes, all.size_bytes);
    return std::pair(wanted.first_stripe, wanted.crc32c);
  };
  using Kept = std::pair<std::uint64_t, std::vector<std::uint32_t>>;
  EXPECT_EQ(kept({{2 * kStripe - 1, 2, at(4096)}, {3 * kStripe - 1, 1, at(8192)}}), Kept(1, {11, 12}));
  EXPECT_EQ(kept({{4 * kStripe, 5 * kStripe, at(4096)}}), Kept(4, {14})) << "the file has more than its payload";
  EXPECT_EQ(kept({{6 * kStripe, 5, at(4096)}}), Kept(0, {}));
  EXPECT_EQ(kept({}), Kept(0, {}));
}

TEST_F(PrepareTest, ArgumentsThatCannotBeRightAreRefused) {
  const auto load = [&](std::vector<Extent> extents, std::optional<Checksums> checksums = {}) {
    return message_of([&] {
      prepare_load(engine_,
                   {.files = {{.path = "a", .extents = extents, .checksums = checksums ? &*checksums : nullptr}}},
                   nullptr);
    });
  };
  EXPECT_EQ(load({{0, 5, nullptr}}), "load a: extent without a target: invalid argument");
  EXPECT_EQ(load({{0, ~std::uint64_t{0}, at(4096)}}),
            "load a: extent past the end of the address space: invalid argument");
  EXPECT_EQ(load({{0, 5, at(4096)}, {9, 5, at(4100)}}), "load a: targets overlap in memory: invalid argument");
  const auto load_two = [&] {
    prepare_load(
        engine_,
        {.files = {{.path = "a", .extents = {{0, 5, at(4100)}}}, {.path = "b", .extents = {{0, 5, at(4096)}}}}},
        nullptr);
  };
  EXPECT_EQ(message_of(load_two), "load b: targets overlap in memory with those of a: invalid argument");
  EXPECT_EQ(load({}, Checksums{.size_bytes = 1}), "load a: checksums that are not of its size: invalid argument");
  EXPECT_EQ(message_of([&] { store({.extents = {{0, 5, nullptr}}}); }),
            "write the file: extent without a source: invalid argument");
  EXPECT_EQ(message_of([&] { store({.extents = {{std::uint64_t{1} << 63, 5, at(4096)}}}); }),
            "write the file: extent past 2^63: invalid argument");
}

TEST_F(PrepareTest, ARefusedArgumentNamesItsFile) {
  const auto path_of = [](auto call) {
    try {
      call();
    } catch (const Error& error) {
      return error.path();
    }
    return std::filesystem::path("no error");
  };
  const auto load = [&](const std::vector<Extent>& extents) {
    prepare_load(engine_, {.files = {{.path = "a"}, {.path = "b", .extents = extents}}}, nullptr);
  };
  EXPECT_EQ(path_of([&] { load({{0, 5, nullptr}}); }), "b");
  EXPECT_EQ(path_of([&] { load({{0, ~std::uint64_t{0}, at(4096)}}); }), "b");
  EXPECT_EQ(path_of([&] { load({{0, 5, at(4096)}, {9, 5, at(4100)}}); }), "b");
  EXPECT_EQ(path_of([&] { store({.extents = {{0, 5, nullptr}}}); }), "the file");
}

}  // namespace
}  // namespace flashpack::internal
