#include "engine/ground/error.h"
#include "engine/ground/immortal.h"

#include <utility>

namespace flashpack {

namespace {

class Category final : public std::error_category {
 public:
  const char* name() const noexcept override { return "flashpack"; }

  std::string message(int value) const override {
    switch (static_cast<Errc>(value)) {
      case Errc::kInvalidArgument:
        return "invalid argument";
      case Errc::kBadFile:
        return "not a valid checkpoint";
      case Errc::kTruncated:
        return "short read: the file ends before the requested bytes";
      case Errc::kFileChanged:
        return "the file was replaced or changed";
      case Errc::kCancelled:
        return "cancelled";
      case Errc::kDeadlineExceeded:
        return "deadline exceeded";
      case Errc::kUnusable:
        return "engine unusable";
      case Errc::kMismatch:
        return "the file does not fit the module";
      case Errc::kCorrupt:
        return "the bytes do not match their checksum";
    }
    return "unknown error";
  }

  std::error_condition default_error_condition(int value) const noexcept override {
    switch (static_cast<Errc>(value)) {
      case Errc::kInvalidArgument:
        return std::errc::invalid_argument;
      case Errc::kCancelled:
        return std::errc::operation_canceled;
      case Errc::kDeadlineExceeded:
        return std::errc::timed_out;
      default:
        return {value, *this};
    }
  }
};

}  // namespace

const std::error_category& flashpack_category() noexcept { return internal::immortal<Category>(); }

namespace {
// It is made while the program is loaded. A fork during a first call by another thread would leave the child waiting
// for the end of that call.
[[maybe_unused]] const std::error_category& made_at_once = flashpack_category();
}  // namespace

Error::Error(std::error_code code, const std::string& context, std::filesystem::path path, std::uint64_t offset_bytes)
    : std::system_error(code, context), context_(context), path_(std::move(path)), offset_bytes_(offset_bytes) {}

Error::Error(std::error_code code, const std::string& context, std::filesystem::path path, std::uint64_t offset_bytes,
             std::vector<FileError> files)
    : Error(code, context, std::move(path), offset_bytes) {
  files_ = std::make_shared<const std::vector<FileError>>(std::move(files));
}

}  // namespace flashpack
