// Binds the library to Python: converts arguments and errors, and releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_checkpoint.h"
#include "bind_collector.h"
#include "bind_format.h"
#include "bind_memory.h"
#include "bind_pack.h"
#include "bind_scans.h"
#include "flashpack/detail/owner_process.h"
#include "flashpack/engine.h"
#include "flashpack/trace.h"
#include "flashpack/tuning.h"
#include "flashpack/verify.h"
#include "footer_objects.h"
#include "native_calls.h"
#include "torch_binding/format/verified.h"
#include "under_way.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashpack {

namespace {

/// Offset in the file in bytes, size in bytes, address in memory.
using ExtentTuple = std::tuple<std::uint64_t, std::uint64_t, std::uintptr_t>;
/// Number of repetitions, and distance between them in the file, in bytes.
using RepeatTuple = std::tuple<std::uint64_t, std::uint64_t>;

PyObject* flashpack_error = nullptr;  // The module owns it and lives as long as the process.

/// The errno that Python gets for a failure that has none; 0 stands for FlashPackError.
int errno_of(Errc code) {
  if (code == Errc::kTruncated) return EIO;
  if (code == Errc::kFileChanged) return ESTALE;
  if (code == Errc::kDeadlineExceeded) return ETIMEDOUT;
  return code == Errc::kCancelled ? ECANCELED : 0;
}

/// Paths, and messages with paths in them, need not be UTF-8.
nb::object text(const std::string& bytes) {
  return nb::steal(PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "surrogateescape"));
}

/// Tells how many files the process may have open, because a model of many files needs one descriptor for each.
std::string with_cure(const Error& error) {
  rlimit files{};
  if (error.code() != std::errc::too_many_files_open || ::getrlimit(RLIMIT_NOFILE, &files) != 0) return error.what();
  return std::string(error.what()) + ": this process may have " + std::to_string(files.rlim_cur) +
         "; \"ulimit -n\" in its shell, or resource.setrlimit() in it, allows more";
}

/// Escapes a message that has line breaks or control characters, which could drive a terminal.
nb::object message_of(const Error& error) {
  nb::object message = text(with_cure(error));
  if (nb::cast<bool>(message.attr("isprintable")())) return message;
  return message.attr("encode")("unicode_escape").attr("decode")();
}

void raise(const Error& error) {
  const nb::object message = message_of(error);
  const bool ours = error.code().category() == flashpack_category();
  const bool cuda = error.code().category() == cuda_category();
  // torch raises RuntimeError for CUDA's errors, too.
  if (cuda || (ours && error.code() == Errc::kUnusable)) return PyErr_SetObject(PyExc_RuntimeError, message.ptr());
  const int number = ours ? errno_of(static_cast<Errc>(error.code().value())) : error.code().value();
  if (number == 0) return PyErr_SetObject(flashpack_error, message.ptr());
  // With an errno, OSError makes an object of the subclass that fits, such as FileNotFoundError.
  const nb::object filename = error.path().empty() ? nb::none() : text(error.path().string());
  const nb::object exception = nb::borrow(PyExc_OSError)(number, message, filename);
  PyErr_SetObject(exception.type().ptr(), exception.ptr());
}

/// `profile` says which profile the engine has.
Dict stats_dict(const TransferStats& stats, const std::string& profile) {
  Dict dict;
  dict["requested_bytes"] = stats.requested_bytes;
  dict["direct_bytes"] = stats.direct_bytes;
  dict["buffered_bytes"] = stats.buffered_bytes;
  dict["staged_bytes"] = stats.staged_bytes;
  dict["operations"] = stats.operations;
  dict["retries"] = stats.retries;
  dict["verified_bytes"] = stats.verified_bytes;
  dict["seconds"] = stats.seconds;
  dict["pinned"] = stats.pinned;
  dict["backend"] = to_string(stats.backend);
  dict["fallback_reason"] = stats.fallback_reason;
  dict["profile"] = text(profile);
  return dict;
}

Device device_of(std::optional<int> cuda_device) {
  return cuda_device ? Device{Device::Kind::kCuda, *cuda_device} : Device{};
}

Backend backend_of(std::string_view name) {
  if (name == "auto") return Backend::kAuto;
  if (name == "workers") return Backend::kWorkers;
  throw Error(Errc::kInvalidArgument, "backend must be auto or workers, got " + std::string(name));
}

const char* text_of(ProfileUse use) {
  switch (use) {
    case ProfileUse::kNone:
      break;
    case ProfileUse::kUsed:
      return "used";
    case ProfileUse::kIgnored:
      return "ignored";
  }
  return "none";
}

/// Arguments of Engine, none if there is no profile, the reason for either, and the use of the profile as text.
nb::typed<nb::tuple, Dict, nb::str, nb::str> tuned_arguments(const std::filesystem::path& path,
                                                             std::optional<int> cuda_device) {
  const NativeCall call;
  TunedOptions tuned;
  {
    nb::gil_scoped_release released;
    tuned = tuned_options(path, device_of(cuda_device));
  }
  Dict dict;
  const char* const use = text_of(tuned.use);
  if (!tuned.applied) return nb::make_tuple(dict, text(tuned.reason), use);
  dict["chunk_bytes"] = tuned.options.chunk_bytes;
  dict["queue_depth"] = tuned.options.queue_depth;
  dict["staging_bytes"] = tuned.options.staging_bytes;
  dict["workers"] = tuned.options.workers;
  dict["backend"] = to_string(tuned.options.backend);
  dict["profile"] = text(tuned.reason);
  return nb::make_tuple(dict, text(tuned.reason), use);
}

/// Repeats `reads` as `repeats` say, whose last is the innermost loop. The repetitions have no gaps in memory.
std::vector<ReadTuple> repeated(std::vector<ReadTuple> reads, const std::vector<RepeatTuple>& repeats) {
  for (auto repeat = repeats.rbegin(); repeat != repeats.rend(); ++repeat) {
    const auto [count, stride_bytes] = *repeat;
    std::uint64_t block_bytes = 0;
    for (const ReadTuple& read : reads) block_bytes += std::get<2>(read);
    std::vector<ReadTuple> all;
    all.reserve(reads.size() * count);
    for (std::uint64_t i = 0; i < count; ++i) {
      for (const auto& [file, offset_bytes, size_bytes, address] : reads)
        all.emplace_back(file, offset_bytes + i * stride_bytes, size_bytes, address + i * block_bytes);
    }
    reads = std::move(all);
  }
  return reads;
}

CUstream_st* stream_of(std::uintptr_t handle) {
  return reinterpret_cast<CUstream_st*>(handle);  // NOLINT(performance-no-int-to-ptr)
}

struct PyLoad {
  std::shared_ptr<const Checkpoint> checkpoint;  // Shared with Python, which may close it earlier.
  Verify policy;
  std::string profile;
  UnderWay load;
};

nb::typed<nb::list, Dict> finish_loads(const nb::typed<nb::list, PyLoad>& loads, const ProgressFunction& progress) {
  const NativeCall call;
  // Other threads may change the list while this one waits.
  std::vector<nb::object> kept;
  for (const nb::handle load : loads) kept.push_back(nb::borrow(load));
  std::vector<Transfer*> transfers;
  for (const nb::object& load : kept) transfers.push_back(&nb::cast<PyLoad&>(load).load.transfer);
  nb::list all_stats;
  for (const nb::object& object : kept) {
    const PyLoad& each = nb::cast<PyLoad&>(object);
    all_stats.append(stats_dict(verified(*each.checkpoint, each.policy,
                                         [&] {
                                           wait_for_all(transfers, progress);  // Only the first call has to wait.
                                           return each.load.transfer.stats();
                                         }),
                                each.profile));
  }
  return all_stats;
}

class PyEngine {
 public:
  PyEngine(std::optional<int> cuda_device, std::optional<std::uint32_t> chunk_bytes,
           std::optional<std::uint32_t> queue_depth, std::optional<std::uint64_t> staging_bytes,
           std::optional<std::uint32_t> workers, std::string profile, ChromeTrace* trace, std::string_view backend)
      : profile_(std::move(profile)) {
    const NativeCall call;
    EngineOptions options;
    options.memory_pool = pool_of_process();
    nb::gil_scoped_release released;
    options.device = device_of(cuda_device);
    options.chunk_bytes = chunk_bytes.value_or(options.chunk_bytes);
    options.queue_depth = queue_depth.value_or(options.queue_depth);
    options.staging_bytes = staging_bytes.value_or(options.staging_bytes);
    options.workers = workers.value_or(options.workers);
    options.trace = trace;
    options.backend = backend_of(backend);
    engine_ = std::make_unique<Engine>(std::move(options));
  }
  ~PyEngine() {
    const ReleasedUnlessEnded released;
    engine_.reset();
  }

  Dict load(const PyCheckpoint& opened, const std::vector<ReadTuple>& reads, std::string_view verify,
            const ProgressFunction& progress, std::uintptr_t stream, const std::vector<RepeatTuple>& repeats) {
    const NativeCall call;
    const Verify policy = verify_policy(verify);
    const auto checkpoint = opened.get();
    Transfer transfer = start(*checkpoint, repeated(reads, repeats), policy, stream);
    return stats_dict(verified(*checkpoint, policy,
                               [&] {
                                 wait_for_all(std::array{&transfer}, progress);
                                 return transfer.stats();
                               }),
                      profile_);
  }

  PyLoad start_load(const PyCheckpoint& opened, const std::vector<ReadTuple>& reads, nb::object memory,
                    std::string_view verify, std::uintptr_t stream) {
    const NativeCall call;
    const Verify policy = verify_policy(verify);
    auto checkpoint = opened.get();
    Transfer transfer = start(*checkpoint, reads, policy, stream);
    return {std::move(checkpoint), policy, profile_, {std::move(memory), std::move(transfer)}};
  }

  Dict verify(const PyCheckpoint& opened, std::size_t file, const ProgressFunction& progress) {
    const NativeCall call;
    const auto checkpoint = opened.get();
    if (file >= checkpoint->files().size()) throw nb::index_error("there is no such file");
    const auto& [path, metadata, fd] = checkpoint->files()[file];
    VerifyReport report;
    {
      nb::gil_scoped_release released;
      report = verify_payload(*engine_, fd.get(), path, metadata, [&](std::uint64_t done_bytes) {
        nb::gil_scoped_acquire acquired;
        if (progress) (*progress)(done_bytes);
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
        leave_if_ended();
      });
    }
    nb::list corrupt;
    for (const auto& [offset_bytes, size_bytes, tensors] : report.corrupt)
      corrupt.append(nb::make_tuple(offset_bytes, size_bytes, tensors));
    Dict dict;
    dict["verified_bytes"] = report.verified_bytes;
    dict["corrupt"] = corrupt;
    dict["seconds"] = report.seconds;
    return dict;
  }

  FileWriter create(const std::filesystem::path& path, const WriterOptions& options) {
    const NativeCall call;
    nb::gil_scoped_release released;
    return engine_->create(path, options);
  }

 private:
  Transfer start(const Checkpoint& checkpoint, const std::vector<ReadTuple>& reads, Verify policy,
                 std::uintptr_t stream) {
    nb::gil_scoped_release released;
    return engine_->start_load({.files = files_of(checkpoint, reads, policy), .stream = stream_of(stream)});
  }

  const std::string profile_;
  std::unique_ptr<Engine> engine_;
};

class PyWriter {
 public:
  bool in_use = false;  ///< See one_at_a_time().

  PyWriter(PyEngine& engine, const std::filesystem::path& path, std::uint64_t payload_bytes, bool checksums,
           bool follow_links)
      : writer_(engine.create(
            path, {.payload_bytes = payload_bytes, .checksums = checksums, .follow_links = follow_links})) {}
  ~PyWriter() { abort(); }

  void start_write(const std::vector<ExtentTuple>& extents, nb::object sources, std::uintptr_t stream) {
    const NativeCall call;
    WriteRequest request{.stream = stream_of(stream)};
    for (const auto& [offset, size, address] : extents) {
      request.extents.push_back(
          {offset, size, reinterpret_cast<const void*>(address)});  // NOLINT(performance-no-int-to-ptr)
    }
    FileWriter& writer = open();
    Transfer transfer;
    {
      nb::gil_scoped_release released;
      transfer = writer.start_write(std::move(request));
    }
    writes_.emplace_back(std::move(sources), std::move(transfer));
  }

  void finish(std::size_t but, const ProgressFunction& progress) {
    const NativeCall call;
    for (; writes_.size() > but; writes_.pop_front()) {
      Transfer& oldest = writes_.front().transfer;
      wait_for_all(std::array{&oldest}, progress, finished_bytes_);
      finished_bytes_ += oldest.stats().requested_bytes;
    }
  }

  Checksums checksums() {
    finish(0, std::nullopt);
    return open().checksums();
  }

  void commit(const nb::bytes& tail) {
    const NativeCall call;
    finish(0, std::nullopt);
    const auto bytes = std::as_bytes(std::span(tail.c_str(), tail.size()));
    FileWriter& writer = open();
    nb::gil_scoped_release released;
    writer.commit(bytes);
    writer_.reset();
  }

  void abort() {
    writes_.clear();
    const ReleasedUnlessEnded released;
    writer_.reset();
  }

 private:
  FileWriter& open() {
    if (!writer_) throw Error(Errc::kInvalidArgument, "the file has been committed or aborted");
    return *writer_;
  }

  std::optional<FileWriter> writer_;
  std::deque<UnderWay> writes_;
  std::uint64_t finished_bytes_ = 0;
};

template <typename Class>
void refuse_pickling(nb::class_<Class>& type) {
  type.def("__reduce__", [](nb::handle) -> nb::str {
    throw nb::type_error("cannot pickle or copy: it owns threads and kernel resources; make one in each process");
  });
}

void bind_trace(nb::module_& module) {
  auto trace = nb::class_<ChromeTrace>(module, "Trace", "A file of what engines do, in Chrome's trace format.")
                   .def(nb::init<const std::filesystem::path&>(), "path"_a,
                        "Empties the file. Raises BlockingIOError if another Trace has it, also of another process.");
  refuse_pickling(trace);
}

void bind_owner_process(nb::module_& module) {
  nb::class_<detail::OwnerProcess>(module, "OwnerProcess", "The process that has made the object. It is thread-safe.")
      .def(nb::init<>())
      .def("is_current", &detail::OwnerProcess::is_current);
}

void bind_handles(nb::module_& module) {
  auto load = nb::class_<PyLoad>(module, "Load", "A load that is under way. Its last reference ends it.");
  auto engine =
      nb::class_<PyEngine>(module, "Engine", "Threads, ring and staging memory of this process; thread-safe.")
          .def(nb::init<std::optional<int>, std::optional<std::uint32_t>, std::optional<std::uint32_t>,
                        std::optional<std::uint64_t>, std::optional<std::uint32_t>, std::string, ChromeTrace*,
                        std::string_view>(),
               "cuda_device"_a = nb::none(), "chunk_bytes"_a = nb::none(), "queue_depth"_a = nb::none(),
               "staging_bytes"_a = nb::none(), "workers"_a = nb::none(), "profile"_a = "",
               "trace"_a.none() = nb::none(), "backend"_a = "auto", nb::keep_alive<1, 8>(),
               "Makes an engine, which chooses each option that is None. Its loads name `profile` in their statistics.")
          .def("load", &PyEngine::load, "checkpoint"_a, "reads"_a, "verify"_a = "auto", "progress"_a = nb::none(),
               "stream"_a = 0, "repeats"_a = std::vector<RepeatTuple>(),
               "Reads (index of the file, file offset, size, address), which are sorted by file, and returns the "
               "transfer's statistics. `repeats`: (count, bytes in the file from one to the next), outermost first, of "
               "all reads; their memory lies one after the other. "
               "Device memory is not written before what is on `stream` (a cudaStream_t) has ended.")
          .def("start_load", &PyEngine::start_load, "checkpoint"_a, "reads"_a, "memory"_a, "verify"_a = "auto",
               "stream"_a = 0, "The same for finish_loads(); `memory` is kept alive until the end.")
          .def("verify", &PyEngine::verify, "checkpoint"_a, "file"_a = 0, "progress"_a = nb::none(),
               "Reads the payload of one file and returns verified_bytes, corrupt (file offset, size, names) and "
               "seconds.");
  module.def("finish_loads", &finish_loads, "loads"_a, "progress"_a = nb::none(),
             "Waits for loads and returns the statistics of each. If one fails, or `progress`, all end.");
  refuse_pickling(load);
  refuse_pickling(engine);
}

void bind_writer(nb::module_& module) {
  auto writer =
      nb::class_<PyWriter>(module, "Writer", "A file that appears whole on commit(), or not at all.")
          .def(nb::init<PyEngine&, const std::filesystem::path&, std::uint64_t, bool, bool>(), "engine"_a, "path"_a,
               "payload_bytes"_a, "checksums"_a = false, "follow_links"_a = true, nb::keep_alive<1, 2>())
          .def("start_write", one_at_a_time(&PyWriter::start_write), "extents"_a, "sources"_a, "stream"_a = 0,
               "Starts writing extents of (file offset, size, address); `sources` is kept alive until the end. "
               "Device memory is not read before what is on `stream` (a cudaStream_t) has ended.")
          .def("finish", one_at_a_time(&PyWriter::finish), "but"_a = 0, "progress"_a = nb::none(),
               "Waits for the writes that were started, oldest first, until no more than `but` are under way.")
          .def("checksums", one_at_a_time(&PyWriter::checksums),
               "The checksums of all bytes that have been written, if the writer was made with `checksums`.")
          .def("commit", one_at_a_time(&PyWriter::commit), "tail"_a,
               "Appends `tail` and puts the durable file in place.")
          .def("abort", one_at_a_time(&PyWriter::abort), "Removes what was written, unless committed.");
  refuse_pickling(writer);
}

void bind_profiles(nb::module_& module) {
  module.def(
      "tuned_options", &tuned_arguments, "path"_a, "cuda_device"_a = nb::none(),
      "Returns the arguments of Engine from the profile for loads of `path`, none if no profile applies, why, and "
      "whether a profile was \"used\", \"ignored\", or there is \"none\".");
}

void bind_errors(nb::module_& module) {
  const auto name = nb::cast<std::string>(module.attr("__name__")) + ".FlashPackError";
  flashpack_error =
      PyErr_NewExceptionWithDoc(name.c_str(), "A file or an argument that is not valid.", PyExc_ValueError, nullptr);
  if (flashpack_error == nullptr) throw nb::python_error();
  module.attr("FlashPackError") = nb::borrow(flashpack_error);
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const Error& error) {
      raise(error);
    }
  });
}

/// Raises ImportError in a subinterpreter. nanobind finds its classes through one pointer for the whole process, so
/// that an import by a second interpreter would take them from the first.
int refuse_subinterpreters(PyObject* /*module*/) {
  if (PyInterpreterState_GetID(PyInterpreterState_Get()) == 0) return 0;
  PyErr_SetString(PyExc_ImportError,
                  "flashpack works in the main interpreter of a process alone, and this is a subinterpreter: use a "
                  "process (multiprocessing) or a thread in its place");
  return -1;
}

}  // namespace

}  // namespace flashpack

NB_MODULE(_native_of_main, module) {
  nb::set_leak_warnings(false);
  module.attr("version") = FLASHPACK_VERSION;
  flashpack::bind_native_calls(module);
  flashpack::bind_errors(module);
  flashpack::bind_format(module);
  flashpack::bind_checkpoint(module);
  flashpack::bind_pack(module);
  flashpack::bind_collector(module);
  flashpack::bind_scans(module);
  flashpack::bind_memory(module);
  flashpack::bind_trace(module);
  flashpack::bind_owner_process(module);
  flashpack::bind_handles(module);
  flashpack::bind_writer(module);
  flashpack::bind_profiles(module);
}

/// Python calls this. Adds a first step to those in which nanobind makes the module, because the others of them come
/// too late to refuse anything. Since 3.13 Python calls this in the main interpreter whoever imports, and only the
/// steps in the one that does.
extern "C" NB_EXPORT PyObject* PyInit__native() {
  static std::array<PyModuleDef_Slot, 16> steps{};
  PyObject* const object = PyInit__native_of_main();
  if (object == nullptr || steps[0].slot != 0) return object;
  auto* const definition = reinterpret_cast<PyModuleDef*>(object);
  steps[0] = {Py_mod_exec, reinterpret_cast<void*>(&flashpack::refuse_subinterpreters)};
  for (std::size_t i = 0; i + 2 < steps.size() && definition->m_slots[i].slot != 0; ++i)
    steps[i + 1] = definition->m_slots[i];
  definition->m_slots = steps.data();
  return object;
}
