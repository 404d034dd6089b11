#include "flashpack/trace.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <new>
#include <set>
#include <utility>
#include <vector>

#include "engine/ground/error.h"
#include "engine/ground/system_call.h"
#include "engine/ground/unique_fd.h"
#include "flashpack/detail/owner_process.h"

namespace flashpack {

namespace {

using internal::argument_error;
using internal::errno_code;
using internal::file_error;

// Some hundreds of events go into each write to the file. A bound, and not tuned.
constexpr std::size_t kBufferBytes = 64 << 10;

// Where the rows of each kind begin, which are shown in the order of their numbers. More than 99,999 transfers at a
// time would share rows with files.
constexpr std::uint32_t kTransferRows = 1;
constexpr std::uint32_t kFileRows = 100'000;
constexpr std::uint32_t kChunkRows = 200'000;

// The length of the UTF-8 character that `text` begins with; 0 if it begins with none.
std::size_t character_length(std::string_view text) {
  const auto first = static_cast<unsigned char>(text.front());
  if (first < 0x80) return 1;
  const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < length) return 0;
  std::uint32_t code = first & (0x7Fu >> length);
  for (const char next : text.substr(1, length - 1)) {
    if ((static_cast<unsigned char>(next) & 0xC0u) != 0x80) return 0;
    code = code << 6 | (static_cast<unsigned char>(next) & 0x3Fu);
  }
  const bool too_long = (length == 3 && code < 0x800) || (length == 4 && code < 0x10000);
  const bool no_character = (code >= 0xD800 && code < 0xE000) || code > 0x10FFFF;
  return too_long || no_character ? 0 : length;
}

// Paths need not be UTF-8, which JSON is.
void append_string(std::string& json, std::string_view text) {
  json += '"';
  while (!text.empty()) {
    const std::size_t length = character_length(text);
    const auto first = static_cast<unsigned char>(text.front());
    if (length == 0) {
      json += "\\ufffd";
    } else if (first < 0x20 || first == '"' || first == '\\') {
      std::array<char, 8> escaped{};
      std::snprintf(escaped.data(), escaped.size(), "\\u%04x", first);
      json += escaped.data();
    } else {
      json.append(text.substr(0, length));
    }
    text.remove_prefix(std::max<std::size_t>(length, 1));
  }
  json += '"';
}

// Chrome's times are microseconds; three digits behind the point keep the nanoseconds.
void append_time(std::string& json, std::chrono::nanoseconds time) {
  std::array<char, 32> digits{};
  const auto count = static_cast<long long>(time.count());
  std::snprintf(digits.data(), digits.size(), "%lld.%03lld", count / 1000, count % 1000);
  json += digits.data();
}

}  // namespace

const char* to_string(TraceStage stage) noexcept {
  switch (stage) {
    case TraceStage::kRead:
      return "read";
    case TraceStage::kReadCached:
      return "read cached";
    case TraceStage::kPopulate:
      return "populate";
    case TraceStage::kCopy:
      return "copy";
    case TraceStage::kChecksum:
      return "checksum";
    case TraceStage::kWrite:
      return "write";
    case TraceStage::kWriteCached:
      return "write cached";
    case TraceStage::kWait:
      return "wait for stream";
    case TraceStage::kOpen:
      return "open";
    case TraceStage::kClose:
      return "close";
    case TraceStage::kTransfer:
      return "transfer";
  }
  return "unknown";
}

class TraceTotals::Impl {
 public:
  // Asked before the mutex is taken, because a thread of the parent may have had it at the fork.
  bool is_owner() const { return owner_.is_current(); }

  void add(const TraceEvent& event) {
    const auto add = [&event](Totals& totals) {
      Total& total = totals[static_cast<std::size_t>(event.stage)];
      ++total.steps;
      total.bytes += event.size_bytes;
      total.seconds += std::chrono::duration<double>(event.end - event.begin).count();
      total.depth = std::max(total.depth, event.depth);
    };
    const std::lock_guard lock(mutex_);
    add(totals_);
    add(of_devices_[event.device]);
    auto file = of_files_.find(event.path);
    if (file == of_files_.end()) {
      const std::string_view path = of_files_.size() < kMostFiles ? event.path : std::string_view();
      file = of_files_.try_emplace(std::string(path)).first;
    }
    add(file->second);
  }

  Totals totals() const {
    const std::lock_guard lock(mutex_);
    return totals_;
  }

  std::map<std::string, Totals, std::less<>> totals_of_files() const {
    const std::lock_guard lock(mutex_);
    return of_files_;
  }

  std::map<std::uint32_t, Totals> totals_of_devices() const {
    const std::lock_guard lock(mutex_);
    return of_devices_;
  }

 private:
  const detail::OwnerProcess owner_;
  mutable std::mutex mutex_;  // Protects the rest.
  Totals totals_;
  std::map<std::string, Totals, std::less<>> of_files_;
  std::map<std::uint32_t, Totals> of_devices_;
};

TraceTotals::TraceTotals() : impl_(std::make_unique<Impl>()) {}

TraceTotals::~TraceTotals() {
  if (!impl_->is_owner()) detail::leave_to_parent(impl_);
}

void TraceTotals::event(const TraceEvent& event) noexcept {
  if (impl_->is_owner()) impl_->add(event);
}

TraceTotals::Totals TraceTotals::totals() const { return impl_->is_owner() ? impl_->totals() : Totals(); }

std::map<std::string, TraceTotals::Totals, std::less<>> TraceTotals::totals_of_files() const {
  if (!impl_->is_owner()) return {};
  return impl_->totals_of_files();
}

std::map<std::uint32_t, TraceTotals::Totals> TraceTotals::totals_of_devices() const {
  if (!impl_->is_owner()) return {};
  return impl_->totals_of_devices();
}

namespace {

// While it lives, the calling thread gets no SIGPIPE. A FIFO whose reader has gone is an error of the trace, which must
// not end the program.
class WithoutSigpipe {
 public:
  WithoutSigpipe() {
    ::sigemptyset(&sigpipe_);
    ::sigaddset(&sigpipe_, SIGPIPE);
    sigset_t pending;
    ::sigpending(&pending);
    was_pending_ = ::sigismember(&pending, SIGPIPE) == 1;
    ::pthread_sigmask(SIG_BLOCK, &sigpipe_, &before_);
  }
  ~WithoutSigpipe() {
    const timespec now{};
    if (!was_pending_) ::sigtimedwait(&sigpipe_, nullptr, &now);
    ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  WithoutSigpipe(const WithoutSigpipe&) = delete;
  WithoutSigpipe& operator=(const WithoutSigpipe&) = delete;

 private:
  sigset_t sigpipe_{};
  sigset_t before_{};
  bool was_pending_ = false;
};

}  // namespace

class ChromeTrace::Impl {
 public:
  // Without O_NONBLOCK, open() of a FIFO waits for a reader, and with it, a FIFO without a reader is an error.
  explicit Impl(const std::filesystem::path& path)
      : fd_(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0666)) {
    if (!fd_) throw file_error(errno_code(errno), "open", path);
    struct stat status{};
    if (::fstat(fd_.get(), &status) != 0) throw file_error(errno_code(errno), "stat", path);
    if (S_ISBLK(status.st_mode)) throw argument_error("trace", path, "a disk, whose contents it would replace");
    if (::fcntl(fd_.get(), F_SETFL, 0) != 0) throw file_error(errno_code(errno), "open", path);
    // Emptied only now, because another one may be writing it.
    if (::flock(fd_.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)  // Some file systems have no locks.
      throw file_error(errno_code(errno), "lock", path);
    if (::ftruncate(fd_.get(), 0) != 0 && errno != EINVAL) throw file_error(errno_code(errno), "truncate", path);
    json_ = "[";
    flush();
  }

  ~Impl() {
    json_ += "\n]\n";
    flush();
    ::flock(fd_.get(), LOCK_UN);  // A child that has inherited the descriptor would keep the lock.
  }

  // Asked before the mutex is taken, because a thread of the parent may have had it at the fork.
  bool is_owner() const { return owner_.is_current(); }

  void add(const TraceEvent& event) {
    if (!is_owner()) return;
    const std::lock_guard lock(mutex_);
    if (error_) return;
    if (json_.capacity() < kBufferBytes) json_.reserve(kBufferBytes + 4096);
    const std::uint32_t row = row_of(event);
    begin("X", to_string(event.stage), event.engine, row);
    json_ += R"(,"ts":)";
    append_time(json_, event.begin.time_since_epoch());
    json_ += R"(,"dur":)";
    append_time(json_, event.end - event.begin);
    json_ += R"(,"args":{"transfer":)" + std::to_string(event.transfer) + R"(,"file":)" + std::to_string(event.file);
    json_ += R"(,"offset":)" + std::to_string(event.offset_bytes) + R"(,"bytes":)" + std::to_string(event.size_bytes);
    json_ += R"(,"depth":)" + std::to_string(event.depth) + R"(,"device":)";
    json_ += std::to_string(event.device) + R"(,"path":)";
    append_string(json_, event.path);
    if (event.stage == TraceStage::kTransfer) {
      json_ += R"(,"error":)";
      append_string(json_, event.error ? event.error.message() : std::string());
      json_ += R"(,"note":)";
      append_string(json_, event.note);
    }
    json_ += "}}";
    if (json_.size() >= kBufferBytes || event.stage == TraceStage::kTransfer) flush();
  }

  void flush_now() {
    if (!is_owner()) return;
    const std::lock_guard lock(mutex_);
    flush();
  }

  void stop(std::error_code error) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = error;
  }

  std::error_code error() const {
    if (!is_owner()) return {};
    const std::lock_guard lock(mutex_);
    return error_;
  }

  // For a forked child, which would keep the file locked after its parent was killed.
  void close_file() { fd_.reset(); }

 private:
  // The ends of what is in the rows of one kind.
  using Rows = std::vector<std::chrono::steady_clock::time_point>;
  struct EngineRows {
    Rows transfers;
    Rows files;
    std::set<std::uint32_t> chunks;  // The lanes that have a name.
  };

  // The row that the event belongs to. Rows that are used for the first time are named.
  std::uint32_t row_of(const TraceEvent& event) {
    const auto [engine, is_new] = engines_.try_emplace(event.engine);
    if (is_new) name("process_name", event.engine, 0, "flashpack engine " + std::to_string(event.engine));
    EngineRows& rows = engine->second;
    switch (event.stage) {
      case TraceStage::kTransfer:
        return kTransferRows + free_row(rows.transfers, event, kTransferRows, "transfers");
      case TraceStage::kOpen:
      case TraceStage::kClose:
        return kFileRows + free_row(rows.files, event, kFileRows, "files");
      default:
        if (rows.chunks.insert(event.lane).second)
          name("thread_name", event.engine, kChunkRows + event.lane, "chunk " + std::to_string(event.lane));
        return kChunkRows + event.lane;
    }
  }

  // The first of the rows in which nothing is under way when the event begins. An engine tells of them in the order of
  // their ends.
  std::uint32_t free_row(Rows& rows, const TraceEvent& event, std::uint32_t first, const char* kind) {
    auto row = std::find_if(rows.begin(), rows.end(), [&](const auto& end) { return end <= event.begin; });
    const auto index = static_cast<std::uint32_t>(row - rows.begin());
    if (row == rows.end()) {
      name("thread_name", event.engine, first + index, kind);
      row = rows.insert(row, event.end);
    }
    *row = event.end;
    return index;
  }

  // Begins an object of the array.
  void begin(const char* kind, const char* what, std::uint32_t engine, std::uint32_t row) {
    json_ += std::exchange(is_first_, false) ? "\n" : ",\n";
    json_.append(R"({"ph":")").append(kind).append(R"(","name":")").append(what).append(R"(","pid":)");
    json_ += std::to_string(engine) + R"(,"tid":)" + std::to_string(row);
  }

  // Names a process or a row.
  void name(const char* what, std::uint32_t engine, std::uint32_t row, const std::string& text) {
    begin("M", what, engine, row);
    json_ += R"(,"args":{"name":)";
    append_string(json_, text);
    json_ += "}}";
  }

  void flush() {
    const WithoutSigpipe no_signal;
    std::string_view left = json_;
    while (!error_ && !left.empty()) {
      const ssize_t written = internal::uninterrupted([&] { return ::write(fd_.get(), left.data(), left.size()); });
      if (written <= 0) error_ = errno_code(written < 0 ? errno : EIO);
      if (written > 0) left.remove_prefix(static_cast<std::size_t>(written));
    }
    json_.clear();
  }

  const detail::OwnerProcess owner_;
  internal::UniqueFd fd_;     // Constant in the process that made it.
  mutable std::mutex mutex_;  // Protects the rest.
  std::string json_;          // What has not been written yet.
  bool is_first_ = true;
  std::map<std::uint32_t, EngineRows> engines_;
  std::error_code error_;
};

ChromeTrace::ChromeTrace(const std::filesystem::path& path) : impl_(std::make_unique<Impl>(path)) {}

ChromeTrace::~ChromeTrace() {
  if (impl_->is_owner()) return;
  impl_->close_file();
  detail::leave_to_parent(impl_);
}

void ChromeTrace::event(const TraceEvent& event) noexcept {
  try {
    impl_->add(event);
  } catch (const std::bad_alloc&) {
    impl_->stop(errno_code(ENOMEM));
  }
}

void ChromeTrace::flush() noexcept { impl_->flush_now(); }
std::error_code ChromeTrace::error() const noexcept { return impl_->error(); }

}  // namespace flashpack
