#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "engine/pipeline.h"
#include "engine/prepare.h"
#include "engine/staging.h"
#include "engine/workers.h"
#include "tests/support/faulty_queue.h"

namespace flashpack::testing {

/// A pipeline with a thread of its own, on a faulty disk.
class PipelineRig {
 public:
  enum class Shape {
    kRealWorkers,  ///< A faulty disk, workers that work.
    kTwoQueues,    ///< Both faulty.
  };
  static constexpr std::uint32_t kQueueDepth = 4;

  /// `spare_slots` stand in for stuck ones.
  PipelineRig(unsigned seed, Faults faults, Shape shape = Shape::kRealWorkers, std::uint32_t chunk_bytes = 1u << 20,
              std::uint32_t slots = 3, internal::Copier* copier = nullptr, std::uint32_t spare_slots = 0,
              std::uint32_t at_once_bytes = 0)
      : facts_{.chunk_bytes = chunk_bytes, .copier = copier},
        staging_(std::uint64_t{slots + spare_slots} * chunk_bytes, chunk_bytes),
        disk_(seed, faults) {
    const internal::Pipeline::Limits limits{.queue_depth = kQueueDepth,
                                            .worker_depth = kQueueDepth,
                                            .chunk_bytes = chunk_bytes,
                                            .slots = slots,
                                            .at_once_bytes = at_once_bytes};
    pool_.emplace(2u);
    if (shape == Shape::kRealWorkers) {
      workers_ = std::make_unique<internal::Workers>(*pool_, internal::Pipeline::tag_limit(limits), &disk_);
    } else {
      workers_ = std::make_unique<FaultyQueue<internal::WorkQueue>>(seed + 1, faults, &disk_);
    }
    const internal::Queues queues{.disk = disk_, .stand_in = disk_, .workers = *workers_};
    pipeline_ = std::make_unique<internal::Pipeline>(queues, *pool_, copier, staging_.slots(), limits);
    driver_ = std::thread([this] { pipeline_->run(); });
  }

  ~PipelineRig() {
    if (driver_.joinable()) stop();
  }

  /// Returns when all that was started has ended.
  void stop() {
    pipeline_->inbox().close();
    driver_.join();
  }
  void close() { pipeline_->inbox().close(); }

  struct Load {
    std::filesystem::path path;
    std::vector<Extent> extents;
    CachePolicy cache = CachePolicy::kDirect;
    CUstream_st* stream = nullptr;
    std::optional<Deadline> deadline;
    Completion* completion = nullptr;
    bool cancelled = false;
    std::optional<Checksums> checksums;
    bool report_extents = false;
  };

  Transfer start(const Load& load) {
    const Checksums* const checksums = load.checksums ? &*load.checksums : nullptr;
    LoadRequest request{.files = {{.path = load.path, .extents = load.extents, .checksums = checksums}},
                        .cache = load.cache,
                        .stream = load.stream,
                        .deadline = load.deadline,
                        .report_extents = load.report_extents};
    return start(internal::prepare_load(facts_, std::move(request), load.completion), load.cancelled);
  }
  Transfer start_request(LoadRequest request, Completion* completion = nullptr) {
    return start(internal::prepare_load(facts_, std::move(request), completion), false);
  }

  struct Store {
    std::shared_ptr<const internal::TransferState> state;
    Transfer transfer;
  };

  /// With checksums.
  Store start_store(internal::FileUse open, std::vector<SourceExtent> extents, bool cancelled = false) {
    const internal::StoreTarget target{.path = open->file.path(), .open = std::move(open), .checksums = true};
    const WriteRequest request{.extents = std::move(extents)};
    auto state =
        internal::prepare_store(facts_, target, request, internal::extents_of(facts_, request, target.path), nullptr);
    return {state, start(state, cancelled)};
  }

  /// Requires: stopped.
  bool idle() const {
    const auto* workers = faulty_workers();
    return disk_.idle() && (!workers || workers->idle());
  }
  /// Requires: stopped. How often somebody waited while an operation hung.
  std::size_t hangs() const {
    const auto* workers = faulty_workers();
    return disk_.hangs() + (workers ? workers->hangs() : 0);
  }
  /// Any thread: reads at or past that offset do not come back until this is raised.
  void get_stuck_from(std::uint64_t offset_bytes) {
    disk_.get_stuck_from(offset_bytes);
    if (auto* workers = faulty_workers()) workers->get_stuck_from(offset_bytes);
  }
  /// Any thread: what reads the byte at that offset fails.
  void fail_at(std::uint64_t offset_bytes) {
    disk_.fail_at(offset_bytes);
    if (auto* workers = faulty_workers()) workers->fail_at(offset_bytes);
  }
  const FaultyQueue<internal::DiskQueue>& disk() const { return disk_; }
  FaultyQueue<internal::DiskQueue>& disk() { return disk_; }

 private:
  FaultyQueue<internal::WorkQueue>* faulty_workers() const {
    return dynamic_cast<FaultyQueue<internal::WorkQueue>*>(workers_.get());
  }

  Transfer start(std::shared_ptr<internal::TransferState> state, bool cancelled) {
    state->cancel_requested = cancelled;
    pipeline_->inbox().start(state);
    return internal::TransferState::handle(state);
  }

  const internal::EngineFacts facts_;
  internal::Staging staging_;
  FaultyQueue<internal::DiskQueue> disk_;
  std::unique_ptr<internal::WorkQueue> workers_;
  std::optional<internal::Pool>
      pool_;  // Goes after the pipeline, which borrows it, and before all that its threads use.
  std::unique_ptr<internal::Pipeline> pipeline_;
  std::thread driver_;
};

}  // namespace flashpack::testing
