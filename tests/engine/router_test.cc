#include "engine/router.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <optional>
#include <vector>

#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using List = Router::List;

constexpr std::uint32_t kChunk = 1u << 20;
constexpr unsigned kPlenty = 1000;

class RouterTest : public ::testing::Test {
 protected:
  RouterTest() {
    flashpack::testing::write_file(path_, flashpack::testing::random_bytes(8 * kChunk));
    file_.emplace(File::open(path_, std::nullopt, true));
    plan_ = Plan::of_load({{0, 8 * kChunk, reinterpret_cast<std::byte*>(1ull << 30)}}, kChunk, kPageBytes);
  }

  std::vector<std::uint64_t> take_all(Router& router, List list, unsigned questions = kPlenty) {
    std::vector<std::uint64_t> offsets;
    while (const Chunk* chunk = router.find_next(list, questions)) {
      offsets.push_back(chunk->offset_bytes / kChunk);
      router.take(list);
    }
    return offsets;
  }

  flashpack::testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::optional<File> file_;
  Plan plan_;
};

TEST_F(RouterTest, PoliciesDecideWithoutAsking) {
  Router direct(plan_, *file_, CachePolicy::kDirect);
  EXPECT_TRUE(take_all(direct, List::kThroughCache, 0).empty());
  EXPECT_EQ(take_all(direct, List::kPastCache, 0).size(), 8u);
  Router buffered(plan_, *file_, CachePolicy::kBuffered);
  EXPECT_EQ(take_all(buffered, List::kThroughCache, 0).size(), 8u);
}

TEST_F(RouterTest, FilesThatRefuseDirectReadsAreBuffered) {
  Router router(plan_, *file_, CachePolicy::kAuto);
  router.refuse_direct();
  EXPECT_EQ(take_all(router, List::kThroughCache).size(), 8u);
}

TEST_F(RouterTest, CachedChunksAreBufferedAndTheRestDirect) {
  flashpack::testing::drop_from_cache(path_);
  ASSERT_EQ(::posix_fadvise(file_->buffered_fd(), 0, 0, POSIX_FADV_RANDOM), 0);  // No readahead.
  std::vector<std::byte> buffer(2 * kChunk);
  ASSERT_EQ(::pread(file_->buffered_fd(), buffer.data(), buffer.size(), 3 * kChunk), 2 * kChunk);
  if (!Residency(file_->buffered_fd()).seems_cached(3 * kChunk, 2 * kChunk))
    GTEST_SKIP() << "cachestat is not to be had here";
  Router router(plan_, *file_, CachePolicy::kAuto);
  EXPECT_EQ(take_all(router, List::kThroughCache), (std::vector<std::uint64_t>{3, 4}));
  EXPECT_EQ(take_all(router, List::kPastCache), (std::vector<std::uint64_t>{0, 1, 2, 5, 6, 7}));
}

TEST_F(RouterTest, AChunkThatLacksFewPagesGoesThroughThePageCacheThoughTheDiskIsNeeded) {
  flashpack::testing::drop_from_cache(path_);
  ASSERT_EQ(::posix_fadvise(file_->buffered_fd(), 0, 0, POSIX_FADV_RANDOM), 0);  // No readahead.
  std::vector<std::byte> memory(kChunk);
  const auto read = [&](std::uint64_t chunk, std::size_t missing_pages) {
    const std::size_t size = kChunk - missing_pages * kPageBytes;
    ASSERT_EQ(::pread(file_->buffered_fd(), memory.data(), size, static_cast<off_t>(chunk * kChunk)),
              static_cast<ssize_t>(size));
  };
  read(2, 4);
  read(5, 5);
  Router router(plan_, *file_, CachePolicy::kAuto);
  if (!router.fallback_reason().empty()) GTEST_SKIP() << router.fallback_reason();
  EXPECT_TRUE(take_all(router, List::kThroughCache).empty());
  EXPECT_EQ(take_all(router, List::kMostlyCached), (std::vector<std::uint64_t>{2}));
  EXPECT_FALSE(router.exhausted());
  EXPECT_EQ(take_all(router, List::kPastCache), (std::vector<std::uint64_t>{0, 1, 3, 4, 5, 6, 7}));
  EXPECT_TRUE(router.exhausted());
}

TEST_F(RouterTest, WhatIsGivenBackComesAgainOnTheListPastTheCacheAndNothingElseDoes) {
  Router router(plan_, *file_, CachePolicy::kAuto);
  std::vector<const Chunk*> taken;
  unsigned questions = kPlenty;
  for (const List list : {List::kThroughCache, List::kPastCache}) {
    while (const Chunk* chunk = router.find_next(list, questions)) {
      taken.push_back(chunk);
      router.take(list);
    }
  }
  ASSERT_EQ(taken.size(), 8u);
  EXPECT_TRUE(router.on_suspicion());
  router.give_back(plan_.chunks[5]);
  router.give_back(plan_.chunks[2]);
  EXPECT_TRUE(take_all(router, List::kThroughCache).empty());
  EXPECT_EQ(take_all(router, List::kPastCache), (std::vector<std::uint64_t>{2, 5}));
}

TEST_F(RouterTest, AfterAFewWrongAnswersNothingThatWasCalledCachedGoesThroughThePageCache) {
  if (!Residency(file_->buffered_fd()).seems_cached(0, 8 * kChunk)) GTEST_SKIP() << "cachestat is not to be had here";
  Router router(plan_, *file_, CachePolicy::kAuto);
  unsigned questions = kPlenty;
  for (int i = 0; i < 4; ++i) {
    const Chunk* chunk = router.find_next(List::kThroughCache, questions);
    ASSERT_TRUE(chunk) << "all are cached";
    router.take(List::kThroughCache);
    EXPECT_EQ(router.find_next(List::kPastCache, questions), nullptr) << "all have been asked about";
    if (i == 3) router.give_back(plan_.chunks[0]);
  }
  for (int i = 1; i < 4; ++i) router.give_back(plan_.chunks[static_cast<std::size_t>(i)]);
  EXPECT_TRUE(take_all(router, List::kThroughCache).empty());
  EXPECT_EQ(take_all(router, List::kPastCache), (std::vector<std::uint64_t>{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_TRUE(router.exhausted());
}

TEST_F(RouterTest, StopsAskingWhenTheQuestionsRunOutAndGoesOnLater) {
  Router router(plan_, *file_, CachePolicy::kAuto);
  if (!router.on_suspicion()) GTEST_SKIP() << "no direct reads here";
  unsigned questions = 3;
  std::size_t known = 0;
  for (const List list : {List::kPastCache, List::kThroughCache, List::kMostlyCached}) {
    for (; router.find_next(list, questions); ++known) router.take(list);
  }
  EXPECT_EQ(questions, 0u);
  EXPECT_EQ(known, 3u) << "what is known can be taken";
  for (const List list : {List::kPastCache, List::kThroughCache, List::kMostlyCached})
    known += take_all(router, list).size();
  EXPECT_EQ(known, 8u) << "nothing was lost on the way";
}

TEST_F(RouterTest, StoresOfWholeBlocksAreDirect) {
  const Plan plan = Plan::of_store({{5, kChunk, reinterpret_cast<std::byte*>(1ull << 30)}}, kChunk, file_->alignment());
  Router router(plan, *file_);
  EXPECT_EQ(take_all(router, List::kPastCache).size(), 1u);
  EXPECT_EQ(take_all(router, List::kThroughCache).size(), 2u);
  Router without(plan, File::open(path_, std::nullopt, false));
  EXPECT_TRUE(take_all(without, List::kPastCache).empty());
  EXPECT_EQ(take_all(without, List::kThroughCache).size(), 3u);
}

}  // namespace
}  // namespace flashpack::internal
