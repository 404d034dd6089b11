#include "engine/file_tasks.h"

#include <functional>
#include <string>
#include <utility>

#include "engine/transfer_state.h"

namespace flashpack::internal {

namespace {

// The highest of these bits that is set in a subject tells its kind. The subjects of other tasks, which are numbers of
// descriptors, have none of them.
constexpr Pool::Subject kGiven = Pool::Subject{1} << 61;
constexpr Pool::Subject kClosing = Pool::Subject{1} << 62;
constexpr Pool::Subject kOpening = Pool::Subject{1} << 63;

}  // namespace

struct FileTasks::Shared {
  explicit Shared(DiskQueue& disk) : table(&disk), inbox(disk) {}

  FileTable table;
  Inbox inbox;
};

// Opens or closes the file of a part.
class FileTasks::FileTask final : public Pool::Task {
 public:
  FileTask(Part& part, const FileTasks& tasks)
      : transfer_(part.transfer->shared_from_this()),
        part_(part),
        closing_(part.state == Part::State::kClosing),
        check_(closing_ && !transfer_->failure),
        drop_(closing_ && transfer_->after == AfterLoad::kDrop && transfer_->stats.buffered_bytes > 0),
        chunk_bytes_(tasks.chunk_bytes_),
        at_once_bytes_(transfer_->after == AfterLoad::kDrop ? 0 : tasks.at_once_bytes_),
        shared_(tasks.shared_) {
    // The descriptor cannot be the subject, because another file gets its number while the close still hangs.
    subject = closing_ ? reinterpret_cast<std::uintptr_t>(part.open.get()) | kClosing
                       : std::hash<std::string>()(part.path.native()) | kOpening;
  }

  void run() noexcept override {
    closing_ ? close() : open_part(part_, shared_->table, chunk_bytes_, at_once_bytes_);
    if (!shared_->inbox.answer(transfer_, part_)) part_.open.reset();  // The driver has ended, so it cannot close it.
  }

 private:
  void close() noexcept {
    if (check_) check_part(part_);
    if (drop_) part_.file().drop_from_cache();
    const std::shared_ptr<OpenFile> file = std::move(part_.open);
    part_.checked = true;
  }

  std::shared_ptr<TransferState> transfer_;
  Part& part_;
  const bool closing_;
  const bool check_;
  const bool drop_;
  const std::uint32_t chunk_bytes_;
  const std::uint32_t at_once_bytes_;
  const std::shared_ptr<Shared> shared_;
};

class FileTasks::CloseTask final : public Pool::Task {
 public:
  explicit CloseTask(UniqueFd fd) : fd_(std::move(fd)) {
    subject = kGiven;  // All have one subject, so that a dead file system does not take many threads.
  }
  void run() noexcept override { fd_.reset(); }

 private:
  UniqueFd fd_;
};

FileTasks::FileTasks(Pool& pool, DiskQueue& disk, std::uint32_t chunk_bytes, std::uint32_t at_once_bytes)
    : pool_(pool), chunk_bytes_(chunk_bytes), at_once_bytes_(at_once_bytes), shared_(std::make_shared<Shared>(disk)) {}

Inbox& FileTasks::inbox() const noexcept { return shared_->inbox; }

void FileTasks::post(Part& part) { pool_.post(std::make_unique<FileTask>(part, *this)); }

void FileTasks::close(UniqueFd given) { pool_.post(std::make_unique<CloseTask>(std::move(given))); }

}  // namespace flashpack::internal
