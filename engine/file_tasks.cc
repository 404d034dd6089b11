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
        rules_(rules),
        may_wait_for_descriptors_(!part.given && !part.place.alone),
        given_(std::move(part.given)) {
    if (part.transfer->request.after == AfterLoad::kDrop) rules_.at_once_bytes = 0;
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
  OpenRules rules_;
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
