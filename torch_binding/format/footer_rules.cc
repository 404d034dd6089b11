#include <algorithm>
#include <span>
#include <string>
#include <utility>

#include "flashpack/format.h"
#include "torch_binding/format/codec.h"
#include "torch_binding/format/footer_json.h"
#include "torch_binding/format/format_rules.h"

namespace flashpack {

namespace {

/// Checks one footer against the rules of the format. Every member throws Error (kBadFile) for the first broken rule.
class FooterCheck {
 public:
  FooterCheck(std::uint64_t payload_bytes, const std::filesystem::path& path) : path_(path) {
    metadata_.payload_bytes = payload_bytes;
  }

  Metadata run(FooterFields fields) {
    container_.version = version(fields);
    container_.align_bytes = require(fields.align_bytes, "align_bytes");
    container_.macroblocks = container_.version == 3 ? one_macroblock(fields) : several_macroblocks(fields);
    check_macroblocks();
    auto records = require(std::move(fields.records), "index");
    metadata_.records.reserve(records.size());
    container_.macroblock_of.reserve(records.size());
    for (RecordFields& record : records) add_record(std::move(record));
    check_names();
    check_overlap_of_records();
    add_totals(fields);
    metadata_.user_metadata = std::move(fields.user_metadata);
    if (fields.crc32c_per_mib) metadata_.checksums = checksums(*fields.crc32c_per_mib);
    return std::move(metadata_);
  }

 private:
  std::uint32_t version(const FooterFields& fields) const {
    const std::string format = fields.format.value_or("");
    if (format == "flashpack_v3") return 3;
    if (format == "flashpack_v4") return 4;
    fail("Unexpected format: " + (fields.format ? rules::quoted(format) : "none is given"));
  }

  template <typename T>
  T require(std::optional<T> field, const char* key) const {
    if (!field) fail("the footer has no " + std::string(key));
    return *std::move(field);
  }

  std::vector<Macroblock> one_macroblock(const FooterFields& fields) const {
    if (fields.macroblocks) fail("a flashpack_v3 file has one macroblock, but this one lists macroblocks");
    const std::string name = require(fields.target_dtype, "target_dtype");
    const std::optional<DType> dtype = dtype_from_name(name);
    if (!dtype) fail("Unsupported dtype string in metadata: " + rules::quoted(name));
    Macroblock macroblock{.dtype = *dtype};
    macroblock.length_elems = require(fields.total_elems, "total_elems");
    if (__builtin_mul_overflow(macroblock.length_elems, element_bytes(*dtype), &macroblock.length_bytes)) {
      fail("total_elems " + std::to_string(macroblock.length_elems) + " of " + name + " pass 2^64 bytes");
    }
    return {macroblock};
  }

  std::vector<Macroblock> several_macroblocks(FooterFields& fields) const {
    if (!fields.macroblocks || fields.macroblocks->empty()) {
      fail("Missing macroblock metadata for flashpack v4 file.");
    }
    return *std::move(fields.macroblocks);
  }

  void check_macroblocks() const {
    const std::vector<Macroblock>& macroblocks = container_.macroblocks;
    for (std::size_t i = 0; i < macroblocks.size(); ++i) check_macroblock(i);

    std::vector<std::size_t> by_offset;
    for (std::size_t i = 0; i < macroblocks.size(); ++i) {
      if (macroblocks[i].length_bytes > 0) by_offset.push_back(i);
    }
    const auto offset = [&](std::size_t i) { return macroblocks[i].offset_bytes; };
    std::sort(by_offset.begin(), by_offset.end(), [&](auto a, auto b) { return offset(a) < offset(b); });
    for (std::size_t k = 1; k < by_offset.size(); ++k) {
      const std::size_t previous = by_offset[k - 1];
      if (offset(by_offset[k]) < offset(previous) + macroblocks[previous].length_bytes) {
        fail("macroblock " + std::to_string(by_offset[k]) + " overlaps macroblock " + std::to_string(previous));
      }
    }
  }

  void check_macroblock(std::size_t i) const {
    const Macroblock& macroblock = container_.macroblocks[i];
    const std::string where = "macroblock " + std::to_string(i);
    const std::uint64_t width_bytes = element_bytes(macroblock.dtype);
    std::uint64_t length_bytes = 0;
    if (__builtin_mul_overflow(macroblock.length_elems, width_bytes, &length_bytes) ||
        length_bytes != macroblock.length_bytes) {
      fail(where + ": length_bytes " + std::to_string(macroblock.length_bytes) + " is not " +
           std::to_string(macroblock.length_elems) + " elements of " + std::string(dtype_name(macroblock.dtype)));
    }
    if (macroblock.offset_bytes % width_bytes != 0) {
      fail(where + " is misaligned: offset_bytes " + std::to_string(macroblock.offset_bytes) +
           " is not a multiple of the element size " + std::to_string(width_bytes));
    }
    if (macroblock.offset_bytes > metadata_.payload_bytes ||
        macroblock.length_bytes > metadata_.payload_bytes - macroblock.offset_bytes) {
      fail(where + " at " + std::to_string(macroblock.offset_bytes) + "+" + std::to_string(macroblock.length_bytes) +
           " runs past the payload of " + std::to_string(metadata_.payload_bytes) + " bytes");
    }
  }

  void add_record(RecordFields fields) {
    const std::size_t i = metadata_.records.size();
    metadata_.records.push_back({.name = std::move(fields.name), .shape = std::move(fields.shape)});
    container_.macroblock_of.push_back(fields.macroblock);
    if (fields.macroblock >= container_.macroblocks.size()) {
      fail(where(i) + ": Index entry references macroblock " + std::to_string(fields.macroblock) + ", but only " +
           std::to_string(container_.macroblocks.size()) + " blocks exist.");
    }
    const Macroblock& macroblock = container_.macroblocks[fields.macroblock];
    check_place(i, fields, macroblock);
    TensorRecord& record = metadata_.records.back();
    record.dtype = macroblock.dtype;
    record.offset_bytes = macroblock.offset_bytes + fields.offset_elems * element_bytes(macroblock.dtype);
    record.size_bytes = fields.length_elems * element_bytes(macroblock.dtype);
  }

  void check_place(std::size_t i, const RecordFields& fields, const Macroblock& macroblock) const {
    const std::optional<std::uint64_t> count = rules::element_count(metadata_.records[i].shape);
    if (!count) fail("Could not get tensor for " + where(i) + ": the size of its shape passes 2^63");
    if (*count != fields.length_elems) {
      fail("Could not get tensor for " + where(i) + ": its shape has " + std::to_string(*count) +
           " elements, its length is " + std::to_string(fields.length_elems));
    }
    if (fields.offset_elems > macroblock.length_elems ||
        fields.length_elems > macroblock.length_elems - fields.offset_elems) {
      fail("Could not get tensor for " + where(i) + ": elements " + std::to_string(fields.offset_elems) + "+" +
           std::to_string(fields.length_elems) + " run past its macroblock of " +
           std::to_string(macroblock.length_elems));
    }
    const std::uint64_t align_elems = rules::alignment_elems(container_.align_bytes, element_bytes(macroblock.dtype));
    if (fields.offset_elems % align_elems != 0) {
      fail(where(i) + " is misaligned: offset " + std::to_string(fields.offset_elems) + " is not a multiple of " +
           std::to_string(align_elems) + " elements (align_bytes " + std::to_string(container_.align_bytes) + ")");
    }
  }

  void check_names() const {
    std::vector<std::string_view> names;
    names.reserve(metadata_.records.size());
    for (const TensorRecord& record : metadata_.records) names.push_back(record.name);
    if (const auto duplicate = rules::find_duplicate(names)) {
      fail(where(duplicate->second) + " has the name of record " + std::to_string(duplicate->first));
    }
  }

  /// No writer lets tensors share bytes, not even tied ones. A reader gives each tensor memory of its own, so that a
  /// small file whose tensors overlap could demand any amount of memory.
  void check_overlap_of_records() const {
    const auto& records = metadata_.records;
    std::vector<std::size_t> by_offset;
    by_offset.reserve(records.size());
    for (std::size_t i = 0; i < records.size(); ++i) {
      if (records[i].size_bytes > 0) by_offset.push_back(i);
    }
    const auto place = [&](std::size_t i) { return std::pair(records[i].offset_bytes, i); };
    std::sort(by_offset.begin(), by_offset.end(), [&](auto a, auto b) { return place(a) < place(b); });
    for (std::size_t k = 1; k < by_offset.size(); ++k) {
      const TensorRecord& previous = records[by_offset[k - 1]];
      const TensorRecord& record = records[by_offset[k]];
      if (record.offset_bytes < previous.offset_bytes + previous.size_bytes) {
        fail(where(by_offset[k]) + " overlaps " + where(by_offset[k - 1]));
      }
    }
  }

  void add_totals(const FooterFields& fields) {
    std::uint64_t end_bytes = 0;
    for (const Macroblock& macroblock : container_.macroblocks) {
      container_.total_elems += macroblock.length_elems;
      end_bytes = std::max(end_bytes, macroblock.offset_bytes + macroblock.length_bytes);
    }
    if (end_bytes < metadata_.payload_bytes) {
      const std::string what = std::to_string(metadata_.payload_bytes - end_bytes) +
                               " bytes between the last macroblock and the footer belong to no macroblock.";
      // The last stripe covers these bytes, too. A load that leaves them out could not compare its checksum, and
      // tensors in it would be read without verification.
      if (fields.crc32c_per_mib) fail(what);
      warn(what);
    }
    if (fields.total_elems && *fields.total_elems != container_.total_elems) {
      warn("total_elems is " + std::to_string(*fields.total_elems) + ", but the macroblocks have " +
           std::to_string(container_.total_elems) + " elements.");
    }
    if (fields.total_payload_bytes && *fields.total_payload_bytes != end_bytes) {
      warn("total_payload_bytes is " + std::to_string(*fields.total_payload_bytes) +
           ", but the last macroblock ends at " + std::to_string(end_bytes) + ".");
    }
  }

  Checksums checksums(std::string_view digits) const {
    Checksums sums{.size_bytes = metadata_.payload_bytes};
    const std::uint64_t stripes = Checksums::stripes_in(sums.size_bytes);
    if (digits.size() != stripes * rules::kCrcDigits) {
      fail("crc32c_per_mib has " + std::to_string(digits.size()) + " digits, not " + std::to_string(rules::kCrcDigits) +
           " for each MiB of the payload");
    }
    sums.crc32c.reserve(stripes);
    for (; !digits.empty(); digits.remove_prefix(rules::kCrcDigits)) {
      const auto crc = rules::parse_crc(digits.substr(0, rules::kCrcDigits));
      if (!crc) fail("crc32c_per_mib is not hexadecimal");
      sums.crc32c.push_back(*crc);
    }
    return sums;
  }

  std::string where(std::size_t i) const {
    return "record " + std::to_string(i) + " " + rules::quoted(metadata_.records[i].name);
  }

  void warn(std::string sentence) { metadata_.warnings.push_back(std::move(sentence)); }
  [[noreturn]] void fail(const std::string& sentence) const { rules::refuse(path_, sentence); }

  const std::filesystem::path& path_;
  Metadata metadata_;
  Container& container_ = metadata_.container;
};

void check_footer_crc(std::string_view digits, std::string_view json, const std::filesystem::path& path) {
  const std::string end = std::string(digits) + "\"}";
  if (!json.ends_with(std::string(rules::kFooterCrcKey) + end)) {
    rules::refuse(path, "footer_crc32c is not the last key of the footer, or not written as the format has it");
  }
  json.remove_suffix(end.size());
  if (rules::parse_crc(digits) != crc32c(std::as_bytes(std::span(json)))) {
    rules::refuse(path, "the footer does not match its checksum: it is corrupt");
  }
}

std::optional<Codec::Place> locate_footer(OpenedFile& file) {
  const std::string& tail = file.tail();
  if (tail.size() < rules::kTrailerBytes || !tail.ends_with(rules::kMagic)) return std::nullopt;
  const std::uint64_t length_bytes = rules::length_at(tail, tail.size() - rules::kTrailerBytes);
  const std::uint64_t end = file.size_bytes() - rules::kTrailerBytes;
  if (length_bytes > end) {
    rules::refuse(file.path(),
                  "Corrupt footer length: " + std::to_string(length_bytes) + " bytes in a file of " +
                      std::to_string(file.size_bytes()),
                  end);
  }
  file.check_limit("footer", length_bytes, std::numeric_limits<std::uint64_t>::max(), end);
  return Codec::Place{end - length_bytes, length_bytes, end - length_bytes};
}

}  // namespace

const Codec kFlashPackCodec = {FileFormat::kFlashPack, "flashpack", &locate_footer, &parse_footer};

Metadata parse_footer(std::string_view json, std::uint64_t payload_bytes, const std::filesystem::path& path) {
  FooterFields fields = parse_footer_json(json, payload_bytes, path);
  if (fields.footer_crc32c) check_footer_crc(*fields.footer_crc32c, json, path);
  return FooterCheck(payload_bytes, path).run(std::move(fields));
}

}  // namespace flashpack
