#pragma once

#include <unistd.h>

#include <filesystem>
#include <memory>
#include <thread>
#include <vector>

#include "engine/pipeline.h"
#include "engine/staging.h"
#include "engine/workers.h"
#include "tests/support/faulty_queue.h"

namespace flashpack::testing {

/// A pipeline with a thread of its own, on a faulty disk.
class PipelineRig {
 public:
  enum class Shape {
    kRealWorkers,  ///< A faulty disk, workers that work.
    kTwoQueues,    ///< Both faulty, as with io_uring.
    kOneQueue,     ///< One for both, as where io_uring is refused.
  };
  static constexpr engine::Pipeline::Limits kLimits{.queue_depth = 4, .worker_depth = 4};

  PipelineRig(unsigned seed, Faults faults, Shape shape = Shape::kRealWorkers, std::uint32_t chunk_bytes = 1u << 20,
              std::size_t slots = 3, engine::Copier* copier = nullptr)
      : chunk_bytes_(chunk_bytes), staging_(slots * chunk_bytes, chunk_bytes), disk_(seed, faults) {
    if (shape == Shape::kRealWorkers) {
      workers_ = std::make_unique<engine::Workers>(2, engine::Pipeline::tag_limit(kLimits, slots), &disk_);
    } else if (shape == Shape::kTwoQueues) {
      workers_ = std::make_unique<FaultyQueue>(seed + 1, faults, &disk_);
    }
    engine::IoQueue& workers = workers_ ? *workers_ : disk_;
    pipeline_ = std::make_unique<engine::Pipeline>(disk_, workers, copier, staging_.slots(), kLimits);
    driver_ = std::thread([this] { pipeline_->run(); });
  }

  ~PipelineRig() {
    if (driver_.joinable()) stop();
  }

  /// Returns when all that was started has ended.
  void stop() {
    pipeline_->close();
    driver_.join();
  }
  void close() { pipeline_->close(); }

  struct Load {
    std::filesystem::path path;
    std::vector<engine::Piece> extents;
    CachePolicy cache = CachePolicy::kDirect;
    std::optional<Deadline> deadline;
    Completion* completion = nullptr;
    bool cancelled = false;
    const Checksums* checksums = nullptr;  // Only where extents do not overlap.
  };

  /// With a gate: to memory of the copier's device.
  Transfer start(const Load& load, std::unique_ptr<engine::Gate> gate = nullptr) {
    auto state = std::make_shared<engine::TransferState>();
    state->owner = ::getpid();
    state->completion = load.completion;
    state->cancel_requested = load.cancelled;
    state->deadline = load.deadline;
    state->sources.emplace_back(engine::File::open(load.path, std::nullopt, true));
    state->plan.add_load(0, load.extents, chunk_bytes_, state->sources[0].file.alignment().block_bytes,
                         gate != nullptr);
    state->gate = std::move(gate);
    state->router = engine::Router(state->plan, state->sources, load.cache);
    if (load.checksums) {
      state->sources[0].checksums = *load.checksums;
      state->sources[0].sums.emplace(0, load.checksums->size_bytes);
    }
    return start(std::move(state));
  }

  struct Store {
    std::shared_ptr<const engine::TransferState> state;
    Transfer transfer;
  };

  /// With checksums of the first `size_bytes`. `file` is borrowed until the transfer has ended.
  Store start_store(const engine::File& file, std::span<const engine::Piece> extents, std::uint64_t size_bytes,
                    bool cancelled = false) {
    auto state = std::make_shared<engine::TransferState>();
    state->owner = ::getpid();
    state->cancel_requested = cancelled;
    state->store = &file;
    state->store_path = file.path();
    state->store_direct = file.direct_fd() >= 0;
    state->store_sums.emplace(0, size_bytes);
    state->plan.add_store(extents, chunk_bytes_, file.alignment(), true);
    state->router = engine::Router(state->plan, file.alignment().block_bytes);
    return {state, start(state)};
  }

  /// Requires: stopped.
  bool idle() const {
    const auto* workers = dynamic_cast<const FaultyQueue*>(workers_.get());
    return disk_.idle() && (!workers || workers->idle());
  }
  const FaultyQueue& disk() const { return disk_; }
  FaultyQueue& disk() { return disk_; }

 private:
  Transfer start(std::shared_ptr<engine::TransferState> state) {
    state->chunks_open = static_cast<std::uint32_t>(state->plan.chunks.size());
    state->driver = pipeline_.get();
    pipeline_->start(state);
    return engine::TransferState::handle(state);
  }

  const std::uint32_t chunk_bytes_;
  engine::Staging staging_;
  FaultyQueue disk_;
  std::unique_ptr<engine::IoQueue> workers_;  // Null: the disk does their work.
  std::unique_ptr<engine::Pipeline> pipeline_;
  std::thread driver_;
};

}  // namespace flashpack::testing
