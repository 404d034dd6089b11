/// The implementations of Engine and FileWriter.
#pragma once

#include <atomic>
#include <filesystem>
#include <future>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "engine/file.h"
#include "engine/pipeline.h"
#include "engine/prepare.h"
#include "engine/temp_file.h"
#include "engine/transfer_state.h"
#include "flashpack/detail/owner_process.h"
#include "flashpack/engine.h"

namespace flashpack {

namespace internal {
class Staging;
}

/// Thread safety: the const members and start() from any thread, as those of Engine.
class Engine::Impl {
 public:
  explicit Impl(EngineOptions options);
  /// Requires: owner().is_current().
  ~Impl();

  const detail::OwnerProcess& owner() const noexcept { return owner_; }
  const EngineOptions& options() const noexcept { return options_; }
  const std::string& fallback_reason() const noexcept { return fallback_reason_; }
  /// The backend that serves files now: the workers once the kernel has begun to refuse the ring.
  Backend backend() const noexcept { return backend_; }
  const internal::EngineFacts& facts() const noexcept { return facts_; }
  std::uint64_t pinned_bytes() const noexcept;
  /// Hands a prepared transfer to the driver. From then on, only the driver may use TransferState::driver.
  void start(const std::shared_ptr<internal::TransferState>& state);

 private:
  struct Machine;

  void build(Machine& machine);
  const internal::Staging& make_staging(Machine& machine, std::uint32_t slots, std::uint32_t spare_slots);
  void drive(std::promise<void>& ready);
  void run();

  // Constant once the constructor has returned. Before that, the driver thread sets fallback_reason_, pipeline_, facts_
  // and, in options_, the backend and the NUMA node.
  EngineOptions options_;
  std::string fallback_reason_;
  std::atomic<Backend> backend_;  // Set by the driver.
  const std::uint32_t number_;
  const detail::OwnerProcess owner_;
  internal::Pipeline* pipeline_ = nullptr;  // Inside machine_, as is what facts_ points to.
  internal::EngineFacts facts_;
  std::unique_ptr<Machine> machine_;  // Only for the driver thread, which makes and destroys it.
  std::thread driver_;
  std::thread successor_;  // Set by driver_ before it ends.
};

/// Thread safety: one thread at a time, as FileWriter.
class FileWriter::Impl {
 public:
  Impl(Engine::Impl& engine, const std::filesystem::path& path, const WriterOptions& options);
  ~Impl();

  Transfer start_write(const WriteRequest& request, Completion* completion);
  Checksums checksums();
  void commit(std::span<const std::byte> tail);

 private:
  /// Begin and end of each range of the file that has been written.
  using Claims = std::map<std::uint64_t, std::uint64_t>;

  void reserve(std::uint64_t begin_bytes, std::uint64_t end_bytes);
  Claims claims_of(std::span<const internal::Fragment> extents) const;
  void forget_those_that_ended_well();
  void take_results(const char* verb);
  void write_tail(std::span<const std::byte> tail);
  void abort() noexcept;

  Engine::Impl& engine_;
  std::filesystem::path path_;  // Path of the file that is replaced.
  internal::TempFile temp_;
  internal::FileUse open_;       // The file at temp_.path(). Empty after commit or abort, while writes that are under
                                 // way may still use the file.
  std::uint64_t payload_bytes_;  // WriterOptions::payload_bytes, or the end of the last extent if later.
  std::uint64_t reserved_bytes_ = 0;
  const bool want_checksums_;
  internal::StripeSums sums_;  // Sums of transfers that have been removed from transfers_.
  Claims claimed_;
  // Shared with the driver and the handles. Each stays here until its result has been looked at.
  std::vector<std::shared_ptr<internal::TransferState>> transfers_;
};

}  // namespace flashpack
