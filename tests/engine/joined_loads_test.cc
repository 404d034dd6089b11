// Small loads of a file that another load has open, which need no thread to open or close it.
#include <gtest/gtest.h>

#include <cstddef>
#include <filesystem>
#include <functional>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "engine/file.h"
#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/hang.h"
#include "tests/support/temp_dir.h"
#include "tests/support/trace_recorder.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::kMiB;

constexpr std::size_t kLargeBytes = 64 * kMiB;
constexpr std::size_t kBegin = kMiB + 4096;  // Of the small load.

void nothing() {}

/// Calls its function once, on the driver thread, when the first extent has landed.
struct WhenLanded final : Completion {
  explicit WhenLanded(std::function<void()> wanted) : call(std::move(wanted)) {}
  void landed(std::size_t, std::size_t) noexcept override {
    if (call) std::exchange(call, nullptr)();
  }
  void done(Transfer&) noexcept override {}
  std::function<void()> call;
};

class JoinedLoadsTest : public ::testing::Test {
 protected:
  JoinedLoadsTest() { testing::write_file(path_, bytes_); }

  // Loads a MiB of the file while a load of all of it is under way. `before` is called before the start, and
  // `meanwhile` when the MiB has come.
  std::error_code load_within_another(const std::function<void()>& before, std::function<void()> meanwhile) {
    std::vector<Extent> extents;
    for (std::size_t at = 0; at < kLargeBytes; at += 4 * kMiB) extents.push_back({at, 4 * kMiB, large_.data() + at});
    const FileExtents all{.path = path_, .extents = extents};
    const FileExtents some{.path = path_, .extents = {{kBegin, kMiB, small_.data()}}};
    Transfer within;
    WhenLanded has_come(std::move(meanwhile));
    WhenLanded start([&] {
      before();
      within = engine_.start_load({.files = {some}, .cache = CachePolicy::kDirect, .report_extents = true}, &has_come);
    });
    Transfer load = engine_.start_load({.files = {all}, .cache = CachePolicy::kDirect, .report_extents = true}, &start);
    EXPECT_TRUE(load.wait_for(testing::kHang) && within.wait_for(testing::kHang));
    return within.error();
  }

  // How many files have been opened if a load that can be joined has been.
  std::size_t opened_for_both() const {
    const auto file = internal::File::open(path_, std::nullopt, true);
    return file.is_known_to_be_at(path_) ? 1 : 2;
  }
  bool has_read(const std::vector<std::byte>& file) const {
    return testing::same_bytes(small_.data(), file.data() + kBegin, kMiB);
  }

  testing::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "file";
  const std::vector<std::byte> bytes_ = testing::random_bytes(kLargeBytes);
  std::vector<std::byte> large_ = std::vector<std::byte>(kLargeBytes);
  std::vector<std::byte> small_ = std::vector<std::byte>(kMiB);
  testing::TraceRecorder trace_;
  Engine engine_{{.trace = &trace_}};
};

TEST_F(JoinedLoadsTest, ASmallLoadReadsTheFileThatAnotherOneHasOpen) {
  EXPECT_FALSE(load_within_another(nothing, nothing));
  EXPECT_TRUE(has_read(bytes_));
  EXPECT_EQ(trace_.of(TraceStage::kOpen).size(), opened_for_both());
  EXPECT_GE(trace_.of(TraceStage::kClose).size(), opened_for_both()) << "2 if the small load ends last";
}

TEST_F(JoinedLoadsTest, AFileThatHasBeenReplacedIsReadThoughTheOldOneIsOpen) {
  const std::vector<std::byte> others = testing::random_bytes(3 * kMiB, 7);
  testing::write_file(dir_ / "new", others);
  EXPECT_FALSE(load_within_another([&] { std::filesystem::rename(dir_ / "new", path_); }, nothing));
  EXPECT_TRUE(has_read(others));
  EXPECT_EQ(trace_.of(TraceStage::kOpen).size(), 2u);
}

TEST_F(JoinedLoadsTest, AChangeOfTheFileBeforeTheEndIsAnErrorAndOneBeforeTheStartIsNone) {
  const auto change = [this] { std::filesystem::resize_file(path_, kLargeBytes + 1); };
  EXPECT_EQ(load_within_another(nothing, change), Errc::kFileChanged);
  const auto change_again = [this] { std::filesystem::resize_file(path_, kLargeBytes + 2); };
  EXPECT_FALSE(load_within_another(change_again, nothing));
}

}  // namespace
}  // namespace flashpack
