/// Plans how tensors become the bytes of a file. The packers of LibTorch and Python carry out the plan.
///
/// * A tensor that the engine can read, and that is in memory as it will be in the file, is written from there.
/// * Everything else is converted into buffers and written from those: another dtype, another order of elements, memory
///   of another device.
/// * Converted values lie in a buffer as in the file, modulo a page, so that they are written without another copy.
/// * A tensor that is larger than a buffer is converted in pieces, so that the copy of a large tensor is never whole.
///   Pieces end at multiples of kPackPieceBytes in the file where rows allow it, so that whole chunks are written.
/// * Elements on the host that are neighbours in the file and far apart in memory have to be transposed. torch
///   transposes a dense tensor fast and a slice of a larger one slowly. So such a piece is first copied densely, in its
///   memory order, and takes twice its size in the buffer.
/// * A group is what is written by one transfer. It ends when a buffer is full. While one group is being filled, the
///   others of kPackGroups are being written, which keeps the disk's queue full.
///
/// Thread safety: any thread may call the functions; the objects are as standard containers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "flashpack/format.h"

namespace flashpack {

/// With kPackGroups, a bound on the memory that a save takes: 64 MiB, twice what the disk has in flight by default. Not
/// tuned.
inline constexpr std::uint64_t kPackBufferBytes = std::uint64_t{16} << 20;
/// The usual chunk of an engine.
inline constexpr std::uint64_t kPackPieceBytes = kPackBufferBytes / 4;
/// Number of groups at a time. Each has a buffer on the host and one on the device, if it needs them.
inline constexpr std::size_t kPackGroups = 4;
/// torch converts up to this many elements without starting threads. One core is enough for the disk that was measured:
/// a save that converts takes 0.18 s of CPU for a GB and writes 3.8 GB/s, as one that does not (bench/README.md,
/// "Stores and verification"). Faster disks were not.
inline constexpr std::int64_t kPackSerialElems = 32767;

/// Lays out a file of these tensors, and checks that its footer can be written. Throws: as file_order(), make_layout()
/// and check_footer().
Metadata plan_file(std::span<const TensorSpec> tensors, std::uint64_t align_bytes,
                   std::optional<std::span<const std::string>> name_order,
                   std::map<std::string, std::string> user_metadata, bool checksums);

/// A tensor that is to be written.
struct PackSource {
  enum class Form : std::uint8_t {
    kReady,       ///< The tensor is written from where it is.
    kContiguous,  ///< The elements are in the file's order.
    kStrided,  ///< The elements are in another order, but those along the last dim are neighbours, or there is one dim.
    kTransposed,  ///< The elements along the last dim are not neighbours.
  };

  /// `is_final` says whether the values are those of the file, and the engine can read them where they are; `has_rows`
  /// whether the elements along the last dim are neighbours, or there is no more than one dim.
  static Form form_of(bool is_contiguous, bool is_final, bool has_rows) {
    if (is_contiguous) return is_final ? Form::kReady : Form::kContiguous;
    return has_rows ? Form::kStrided : Form::kTransposed;
  }

  Form form = Form::kReady;
  bool on_device = false;           ///< Whether it is converted on the device.
  std::uint32_t element_bytes = 1;  ///< In the file.
  std::uint64_t offset_bytes = 0;   ///< In the file.
  std::span<const std::int64_t> shape;
};

/// Elements of a source that follow on each other in the file. If the source is not contiguous, they are whole slices:
/// one index for each of the first dims, and a range of the next dim.
struct PackStep {
  std::size_t source = 0;
  std::uint64_t first_elem = 0;
  std::uint64_t elems = 0;
  std::optional<std::uint64_t>
      buffer_offset_bytes;  ///< Where the converted elements are in the buffer; empty if ready.
  std::optional<std::uint64_t> scratch_offset_bytes;  ///< Where their dense copy is in the buffer, if they need one.
};
using PackGroup = std::vector<PackStep>;

/// Returns the groups in the order in which they are to be filled. Sources without elements have no step. Requires:
/// `buffer_bytes` is a multiple of 8 pages of 4096 bytes.
std::vector<PackGroup> plan_pack(std::span<const PackSource> sources, std::uint64_t buffer_bytes = kPackBufferBytes);

}  // namespace flashpack
