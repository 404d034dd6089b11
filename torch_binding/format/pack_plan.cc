#include "torch_binding/format/pack_plan.h"

#include <algorithm>
#include <array>
#include <utility>

#include "engine/ground/pages.h"

namespace flashpack {

namespace {

using internal::kPageBytes;
using internal::round_up;

std::uint64_t product(std::span<const std::int64_t> dims) {
  std::uint64_t elems = 1;
  for (const std::int64_t dim : dims) elems *= static_cast<std::uint64_t>(dim);
  return elems;
}

class Planner {
 public:
  explicit Planner(std::uint64_t buffer_bytes)
      : buffer_bytes_(buffer_bytes), piece_bytes_(buffer_bytes * kPackPieceBytes / kPackBufferBytes) {}

  void add(std::size_t index, const PackSource& source) {
    const std::uint64_t elems = product(source.shape);
    if (elems == 0) return;
    index_ = index;
    source_ = &source;
    const std::array flat = {static_cast<std::int64_t>(elems)};
    if (source.form == PackSource::Form::kReady) {
      group_.push_back({.source = index, .elems = elems});
    } else if (source.form == PackSource::Form::kContiguous) {
      add_slice(0, flat);
    } else {
      add_slice(0, source.shape);
    }
  }

  std::vector<PackGroup> finish() {
    end_group();
    return std::move(groups_);
  }

 private:
  /// Adds the slice of shape `dims` that begins at `first_elem`.
  void add_slice(std::uint64_t first_elem, std::span<const std::int64_t> dims) {
    const std::uint64_t elems = product(dims);
    const bool twice = source_->form == PackSource::Form::kTransposed && dims.size() > 1 && !source_->on_device;
    const std::uint64_t most_bytes = (twice ? buffer_bytes_ / 2 : buffer_bytes_) - kPageBytes;
    if (elems * source_->element_bytes <= most_bytes) return add_part(first_elem, elems, twice);

    const std::span<const std::int64_t> row_dims = dims.subspan(1);
    const std::uint64_t row_elems = elems / static_cast<std::uint64_t>(dims.front());
    const std::uint64_t row_bytes = row_elems * source_->element_bytes;
    for (std::uint64_t end = first_elem + elems; first_elem < end;) {
      const std::uint64_t to_border_bytes = piece_bytes_ - offset_bytes(first_elem) % piece_bytes_;
      const std::uint64_t rows = std::min(to_border_bytes / row_bytes, (end - first_elem) / row_elems);
      if (rows > 1) {
        add_part(first_elem, rows * row_elems, twice);
      } else {
        add_slice(first_elem, row_dims);
      }
      first_elem += std::max<std::uint64_t>(rows, 1) * row_elems;
    }
  }

  void add_part(std::uint64_t first_elem, std::uint64_t elems, bool twice) {
    const std::uint64_t size_bytes = elems * source_->element_bytes;
    for (;;) {
      std::uint64_t& used_bytes = used_bytes_[source_->on_device ? 1 : 0];
      const std::uint64_t begin = used_bytes + (offset_bytes(first_elem) - used_bytes) % kPageBytes;
      const std::uint64_t end = begin + size_bytes;
      const std::uint64_t scratch = round_up(end, kPageBytes);
      if ((twice ? scratch + size_bytes : end) <= buffer_bytes_) {
        used_bytes = end;
        group_.push_back({index_, first_elem, elems, begin, twice ? std::optional(scratch) : std::nullopt});
        return;
      }
      end_group();
    }
  }

  void end_group() {
    if (!group_.empty()) groups_.push_back(std::exchange(group_, {}));
    used_bytes_ = {};
  }

  std::uint64_t offset_bytes(std::uint64_t elem) const { return source_->offset_bytes + elem * source_->element_bytes; }

  const std::uint64_t buffer_bytes_;
  const std::uint64_t piece_bytes_;
  std::size_t index_ = 0;
  const PackSource* source_ = nullptr;
  std::vector<PackGroup> groups_;
  PackGroup group_;                            // The group that is being filled.
  std::array<std::uint64_t, 2> used_bytes_{};  // Bytes used in the group's buffers, on host and device.
};

}  // namespace

Metadata plan_file(std::span<const TensorSpec> tensors, std::uint64_t align_bytes,
                   std::optional<std::span<const std::string>> name_order,
                   std::map<std::string, std::string> user_metadata, bool checksums) {
  std::vector<TensorSpec> ordered;
  for (const std::size_t i : file_order(tensors, name_order)) ordered.push_back(tensors[i]);
  Metadata metadata = make_layout(ordered, align_bytes);
  metadata.user_metadata = std::move(user_metadata);
  check_footer(metadata, checksums);
  return metadata;
}

std::vector<PackGroup> plan_pack(std::span<const PackSource> sources, std::uint64_t buffer_bytes) {
  Planner planner(buffer_bytes);
  for (std::size_t i = 0; i < sources.size(); ++i) planner.add(i, sources[i]);
  return planner.finish();
}

}  // namespace flashpack
