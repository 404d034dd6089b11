/// What stands behind Engine and FileWriter.
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/pipeline.h"
#include "engine/transfer_state.h"
#include "engine/unique_fd.h"
#include "flashpack/engine.h"

namespace flashpack {

class Engine::Impl {
 public:
  explicit Impl(EngineOptions options);
  /// Requires: is_owner().
  ~Impl();

  bool is_owner() const noexcept;
  void require_owner() const;
  const EngineOptions& options() const noexcept { return options_; }
  const std::string& fallback_reason() const noexcept { return fallback_reason_; }
  /// Whether only the device can reach `memory`. Throws: Error.
  bool on_device(const void* memory) const;

  std::shared_ptr<engine::TransferState> new_transfer(Completion* completion) const;
  /// Opens one file of a request and adds its chunks. Throws: Error.
  void open_source(engine::TransferState& state, const FileExtents& wanted, CachePolicy cache) const;
  /// Lets the device's part of a prepared transfer wait for what is on `stream` now. Throws: Error.
  void wait_for_stream(engine::TransferState& state, CUstream_st* stream) const;
  /// Hands a prepared transfer to the driver. From here on the driver's part of it is the driver's.
  void start(const std::shared_ptr<engine::TransferState>& state);

 private:
  void drive(std::promise<void>& ready);

  EngineOptions
      options_;  // Backend is settled by the driver thread before the constructor returns; then all is constant.
  std::string fallback_reason_;
  const pid_t owner_;
  engine::Pipeline* pipeline_ = nullptr;  // On the driver thread's stack, until close(), both.
  engine::Copier* copier_ = nullptr;      // Null for the host.
  std::thread driver_;
};

class FileWriter::Impl {
 public:
  Impl(Engine::Impl& engine, const std::filesystem::path& path, const WriterOptions& options);
  ~Impl();

  Transfer start_write(std::vector<SourceExtent> extents, Completion* completion, CUstream_st* stream);
  void commit(std::span<const std::byte> tail);

 private:
  void settle();
  void write_tail(std::span<const std::byte> tail);
  void abort() noexcept;

  Engine::Impl& engine_;
  std::filesystem::path path_;  // Symbolic links resolved: what the new file replaces.
  std::filesystem::path temp_path_;
  engine::UniqueFd fd_;
  std::uint64_t payload_bytes_;  // Announced, or the end of the last extent if that is later.
  std::vector<std::shared_ptr<engine::TransferState>> transfers_;
  bool committed_ = false;
};

}  // namespace flashpack
