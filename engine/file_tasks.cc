#include "engine/file_tasks.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cassert>
#include <functional>
#include <string>
#include <utility>

#include "engine/transfer_state.h"

namespace flashpack::internal {

namespace {

// The top bits of a subject say what the task does. Other tasks use a descriptor's number as their subject, and have
// none of these bits.
constexpr Pool::Subject kReleased = Pool::Subject{1} << 61;
constexpr Pool::Subject kClosing = Pool::Subject{1} << 62;
constexpr Pool::Subject kOpening = Pool::Subject{1} << 63;

// The file system of a descriptor; 0 if the kernel does not tell. The system call is made
// directly, because where the kernel refuses it, glibc's statx() calls fstatat(2), which may wait for the file system.
std::uint64_t file_system_of(const UniqueFd& fd) noexcept {
  struct statx known{};
  if (::syscall(SYS_statx, fd.get(), "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &known) != 0) return 0;
  return ::gnu_dev_makedev(known.stx_dev_major, known.stx_dev_minor);
}

// A load whose pages are to be dropped is not read at once, because the thread that closes its file drops them.
OpenRules rules_for(const Part& part, OpenRules rules) {
  if (part.transfer->request.after == AfterLoad::kDrop) rules.at_once_bytes = 0;
  return rules;
}

// Whether it takes the driver little time to plan the load.
bool is_small(const PartRequest& request, std::uint32_t chunk_bytes) {
  constexpr std::size_t kFewExtents = 16;  // A bound, and not tuned.
  if (request.extents.size() > kFewExtents) return false;
  std::uint64_t total_bytes = 0;
  for (const Fragment& extent : request.extents) total_bytes += extent.size_bytes;
  return total_bytes <= chunk_bytes;
}

}  // namespace

struct FileTasks::Shared {
  explicit Shared(DiskQueue& disk) : table(&disk), inbox(disk) {}

  FileTable table;
  Inbox inbox;
};

class FileTasks::OpenTask final : public Pool::Task {
 public:
  OpenTask(Part& part, OpenRules rules, std::shared_ptr<Shared> shared)
      : shared_(std::move(shared)),
        answer_{part.transfer->shared_from_this(), &part},
        request_(part.request),
        handover_(part.handover),
        rules_(rules_for(part, rules)),
        may_wait_for_descriptors_(!part.given && !part.place.alone),
        given_(std::move(part.given)) {
    // The path of a descriptor is only a name for messages, which files that have nothing to do with each other may
    // share.
    subject = kOpening |
              (given_ ? reinterpret_cast<std::uintptr_t>(&part) : std::hash<std::string>()(part.request.path.native()));
  }

  void run() noexcept override {
    answer_.opened =
        open_part(request_, std::move(given_), handover_, shared_->table, rules_, may_wait_for_descriptors_);
    shared_->inbox.answer(std::move(answer_));
  }

 private:
  // Shared with FileTasks, which may end first. Declared first: the table in it outlives each FileUse below.
  const std::shared_ptr<Shared> shared_;
  Inbox::Answer answer_;  // Keeps the transfer, and with it the part.
  const PartRequest& request_;
  Handover& handover_;
  const OpenRules rules_;
  const bool may_wait_for_descriptors_;
  UniqueFd given_;
};

class FileTasks::CloseTask final : public Pool::Task {
 public:
  CloseTask(Part& part, std::shared_ptr<Shared> shared)
      : shared_(std::move(shared)),
        answer_{part.transfer->shared_from_this(), &part},
        request_(part.request),
        handover_(part.handover),
        planned_(std::move(part.planned)),
        check_(!part.failure),
        drop_(part.transfer->request.after == AfterLoad::kDrop && part.has_used_page_cache) {
    // The descriptor cannot be the subject, because another file gets its number while the close still hangs.
    subject = reinterpret_cast<std::uintptr_t>(planned_->open.get()) | kClosing;
  }

  void run() noexcept override {
    PartResult result;
    if (check_) result = check_part(request_, *planned_);
    if (drop_) planned_->file().drop_from_cache();
    handover_.end(std::move(result));
    planned_.reset();
    shared_->inbox.answer(std::move(answer_));
  }

 private:
  // Shared with FileTasks, which may end first. Declared first: the table in it outlives each FileUse below.
  const std::shared_ptr<Shared> shared_;
  Inbox::Answer answer_;  // Keeps the transfer, and with it the part.
  const PartRequest& request_;
  Handover& handover_;
  std::unique_ptr<PlannedFile> planned_;
  const bool check_;
  const bool drop_;
};

template <class Owner>
class FileTasks::ReleaseTask final : public Pool::Task {
 public:
  ReleaseTask(Owner owner, std::uint64_t file_system) : owner_(std::move(owner)) {
    // Those of one file system have one subject, so that a dead one neither takes many threads nor holds up others.
    subject = kReleased | file_system;
  }
  void run() noexcept override { owner_.reset(); }

 private:
  Owner owner_;
};

FileTasks::FileTasks(Pool& pool, DiskQueue& disk, OpenRules rules)
    : pool_(pool), rules_(rules), shared_(std::make_shared<Shared>(disk)) {}

Inbox& FileTasks::inbox() const noexcept { return shared_->inbox; }

std::unique_ptr<PlannedFile> FileTasks::join(const Part& part) {
  const PartRequest& request = part.request;
  if (part.given || !is_small(request, rules_.chunk_bytes)) return nullptr;
  FileUse use = shared_->table.listed(request.path, request.expected, request.cache != CachePolicy::kBuffered);
  if (!use) return nullptr;
  if (!use->file.is_known_to_be_at(request.path) ||
      may_read_at_once(request, use->file, *use->residency, rules_for(part, rules_).at_once_bytes)) {
    leave(std::move(use));
    return nullptr;
  }
  auto planned = std::make_unique<PlannedFile>(PlannedFile{.open = std::move(use)});
  try {
    plan_load(request, rules_.chunk_bytes, *planned);
  } catch (const Error&) {  // The thread will find it again, and tell.
    leave(std::move(planned->open));
    return nullptr;
  }
  return planned;
}

void FileTasks::leave(FileUse use) {
  if (auto last = use.leave()) close(std::move(last));
}

void FileTasks::open(Part& part) {
  assert(part.state() == Part::State::kOpening && !part.planned);
  pool_.post(std::make_unique<OpenTask>(part, rules_, shared_));
}

void FileTasks::close(Part& part) {
  assert(part.state() == Part::State::kClosing && part.planned);
  pool_.post(std::make_unique<CloseTask>(part, shared_));
}

void FileTasks::close(UniqueFd given) {
  const std::uint64_t file_system = file_system_of(given);
  pool_.post(std::make_unique<ReleaseTask<UniqueFd>>(std::move(given), file_system));
}

void FileTasks::close(std::unique_ptr<OpenFile> file) {
  const std::uint64_t file_system = file->file.identity().dev;
  pool_.post(std::make_unique<ReleaseTask<std::unique_ptr<OpenFile>>>(std::move(file), file_system));
}

}  // namespace flashpack::internal
