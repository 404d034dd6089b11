#include "flashpack/engine.h"

#include <cstdint>
#include <optional>
#include <utility>

#include "flashpack/trace.h"
#include "flashpack/tuning.h"
#include "torch_binding/c/arguments.h"
#include "torch_binding/c/errors.h"
#include "torch_binding/c/handles.h"

namespace flashpack::c {

namespace {

static_assert(FLASHPACK_DEVICE_CUDA == static_cast<int>(Device::Kind::kCuda));
static_assert(FLASHPACK_BACKEND_AUTO == static_cast<int>(Backend::kAuto));
static_assert(FLASHPACK_BACKEND_IO_URING == static_cast<int>(Backend::kIoUring));
static_assert(FLASHPACK_BACKEND_PLAIN_IO_URING == static_cast<int>(Backend::kPlainIoUring));
static_assert(FLASHPACK_BACKEND_WORKERS == static_cast<int>(Backend::kWorkers));

Device device_in(const flashpack_engine_options& given) {
  return {one_of(given.device_kind, Device::Kind::kCuda, "options->device_kind"), given.device_index};
}

EngineOptions options_of(const flashpack_engine_options& given) {
  const auto cpus = array(given.cpu_affinity, given.cpu_count, "options->cpu_affinity");
  const auto more_devices = array(given.more_devices, given.more_device_count, "options->more_devices");
  EngineOptions options{.device = device_in(given),
                        .staging_bytes = given.staging ? 0 : given.staging_bytes,
                        .workers = given.workers,
                        .backend = one_of(given.backend, Backend::kWorkers, "options->backend"),
                        .cpu_affinity = {cpus.begin(), cpus.end()}};
  if (given.staging && given.staging_bytes == 0) throw argument_error("options->staging without staging_bytes");
  if (given.staging) options.staging = {static_cast<std::byte*>(given.staging), given.staging_bytes};
  if (given.chunk_bytes != 0) options.chunk_bytes = given.chunk_bytes;
  if (given.queue_depth != 0) options.queue_depth = given.queue_depth;
  if (given.use_numa_node != 0) options.numa_node = given.numa_node;
  for (const int32_t index : more_devices) options.more_devices.push_back({Device::Kind::kCuda, index});
  return options;
}

// An engine and the trace that it writes, which ends after it.
struct TracedEngine {
  TracedEngine(EngineOptions options, const char* trace_path) : trace(trace_path), engine(with(options, trace)) {}
  static EngineOptions& with(EngineOptions& options, TraceSink& trace) {
    options.trace = &trace;
    return options;
  }

  ChromeTrace trace;
  Engine engine;
};

std::shared_ptr<Engine> make_engine(const flashpack_engine_options& given) {
  EngineOptions options = options_of(given);
  if (!given.trace_path) return std::make_shared<Engine>(std::move(options));
  auto traced = std::make_shared<TracedEngine>(std::move(options), given.trace_path);
  return {traced, &traced->engine};
}

void take_profile(const char* path, flashpack_engine_options& options) {
  const TunedOptions tuned = tuned_options(path, device_in(options));
  if (!tuned.applied) throw NotFound(tuned.reason);
  options.chunk_bytes = tuned.options.chunk_bytes;
  options.queue_depth = tuned.options.queue_depth;
  options.workers = tuned.options.workers;
  options.backend = static_cast<int32_t>(tuned.options.backend);
  if (!options.staging) options.staging_bytes = tuned.options.staging_bytes;
}

}  // namespace

}  // namespace flashpack::c

using namespace flashpack::c;

const char* flashpack_version() { return flashpack::version(); }

flashpack_status flashpack_engine_create(const flashpack_engine_options* options, flashpack_engine** engine,
                                         flashpack_error** error) {
  return guarded(error, [&] {
    auto*& result = result_of(engine, "engine");
    auto made = make_engine(given_or_default(options, "options"));
    result = new flashpack_engine{std::move(made)};
  });
}

flashpack_status flashpack_tuned_options(const char* path, flashpack_engine_options* options, flashpack_error** error) {
  return guarded(error, [&] {
    flashpack_engine_options changed = given(require(options, "options"), "options");
    take_profile(&require(path, "path"), changed);
    give(changed, options, "options");
  });
}

flashpack_status flashpack_engine_get_info(const flashpack_engine* engine, flashpack_engine_info* info,
                                           flashpack_error** error) {
  return guarded(error, [&] {
    const flashpack::Engine& asked = *require(engine, "engine").engine;
    const flashpack::EngineOptions& options = asked.options();
    const std::uint64_t staging_bytes = options.staging.empty() ? options.staging_bytes : options.staging.size();
    give(flashpack_engine_info{.staging_bytes = staging_bytes - staging_bytes % options.chunk_bytes,
                               .chunk_bytes = options.chunk_bytes,
                               .queue_depth = options.queue_depth,
                               .workers = options.workers,
                               .backend = static_cast<int32_t>(options.backend),
                               .fallback_reason = asked.fallback_reason().c_str(),
                               .pinned_bytes = asked.pinned_bytes()},
         info, "info");
  });
}

void flashpack_engine_destroy(flashpack_engine* engine) { delete engine; }
