// flashpack_inspect shows the contents of a checkpoint from its footer or header alone, or verifies its bytes.

#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <boost/json/serialize.hpp>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <exception>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "flashpack/format.h"
#include "flashpack/verify.h"

namespace {

using flashpack::Macroblock;
using flashpack::Metadata;
using flashpack::TensorRecord;

constexpr int kExitBadFile = 1;
constexpr int kExitUsage = 2;

constexpr const char* kDescription =
    "Shows what is in a flashpack or safetensors file: its format, its tensors and where their bytes are.\n"
    "Only the footer or header is read and every rule of the format is checked, so this is also the quick\n"
    "way to ask whether a file is sound. The tensors' bytes are read with --verify alone.";

constexpr const char* kFooter =
    "Examples:\n"
    "  flashpack_inspect model.flashpack\n"
    "  flashpack_inspect model.flashpack --verify\n"
    "  flashpack_inspect model.flashpack --json | jq '.tensors[] | select(.size_bytes > 1e8) | .name'\n"
    "\n"
    "Exit status: 0 the file is sound (warnings included), 1 it is not or cannot be read, or has no checksums to\n"
    "verify, 2 wrong usage.";

/// Makes text safe for a terminal: control characters, which could drive it, become \xHH.
std::string printable(std::string_view utf8) {
  std::string out;
  for (std::size_t i = 0; i < utf8.size(); ++i) {
    const auto byte = static_cast<unsigned char>(utf8[i]);
    const auto next = static_cast<unsigned char>(i + 1 < utf8.size() ? utf8[i + 1] : 0);
    const bool c1 = byte == 0xc2 && next >= 0x80 && next < 0xa0;  // U+0080 to U+009F
    if (byte >= 0x20 && byte != 0x7f && !c1) {
      out += utf8[i];
      continue;
    }
    std::array<char, 5> hex{};
    std::snprintf(hex.data(), hex.size(), "\\x%02x", c1 ? unsigned{next} : unsigned{byte});
    out += hex.data();
    i += c1 ? 1 : 0;
  }
  return out;
}

std::string human_bytes(std::uint64_t bytes) {
  constexpr std::array kUnits = {"bytes", "kB", "MB", "GB", "TB", "PB", "EB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  for (; value >= 1000 && unit + 1 < kUnits.size(); ++unit) value /= 1000;
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.2f %s", value, kUnits[unit]);
  return text.data();
}

std::string exact_bytes(std::uint64_t bytes) {
  return bytes < 1000 ? human_bytes(bytes) : human_bytes(bytes) + " (" + std::to_string(bytes) + " bytes)";
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string out = "[";
  for (const std::int64_t dim : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(dim);
  return out + "]";
}

std::string dtypes_text(const Metadata& metadata) {
  std::string out;
  std::set<std::string_view> listed;
  for (const TensorRecord& record : metadata.records) {
    const std::string_view name = dtype_name(record.dtype);
    if (listed.insert(name).second) out.append(out.empty() ? "" : ", ").append(name);
  }
  return out;
}

/// Lays rows of text out in columns as wide as their widest cell, if that is not very wide. The first row is the
/// heading.
class Table {
 public:
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }

  /// Columns from `first_right` on are numbers and are right-aligned.
  std::string text(std::size_t first_right) const {
    constexpr std::size_t kMostPadding = 120;  // One name of a megabyte must not make every row as long.
    std::vector<std::size_t> widths(rows_.front().size());
    for (const auto& row : rows_) {
      for (std::size_t i = 0; i < row.size(); ++i)
        widths[i] = std::min(kMostPadding, std::max(widths[i], width(row[i])));
    }
    std::string out;
    for (const auto& row : rows_) {
      for (std::size_t i = 0; i < row.size(); ++i) {
        const std::string pad(widths[i] - std::min(widths[i], width(row[i])), ' ');
        out += "  ";
        out += i < first_right ? row[i] + pad : pad + row[i];
      }
      out += '\n';
    }
    return out;
  }

 private:
  static std::size_t width(std::string_view utf8) {
    return static_cast<std::size_t>(
        std::count_if(utf8.begin(), utf8.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
  }

  std::vector<std::vector<std::string>> rows_;
};

bool is_flashpack(const Metadata& metadata) { return metadata.format == flashpack::FileFormat::kFlashPack; }

std::string format_text(const Metadata& metadata) {
  const std::string name(format_name(metadata.format));
  return is_flashpack(metadata) ? name + "_v" + std::to_string(metadata.container.version) : name;
}

std::string summary_text(const Metadata& metadata) {
  const flashpack::Container& container = metadata.container;
  std::string out;
  out += "  format       " + format_text(metadata) + "\n";
  out += "  dtypes       " + dtypes_text(metadata) + "\n";
  out += "  tensors      " + std::to_string(metadata.records.size()) + "\n";
  if (is_flashpack(metadata)) {
    out += "  elements     " + std::to_string(container.total_elems) + "\n";
    out += "  payload      " + exact_bytes(metadata.payload_bytes) + "\n";
  }
  out += "  file         " + exact_bytes(metadata.identity.size_bytes) + "\n";
  out += "  checksums    " + std::string(metadata.checksums ? "CRC-32C of every MiB" : "none") + "\n";
  if (is_flashpack(metadata))
    out += "  alignment    " + (container.align_bytes == 0 ? "dense" : exact_bytes(container.align_bytes)) + "\n";
  for (const auto& [key, value] : metadata.user_metadata)
    out += "  metadata     " + printable(key) + ": " + printable(value) + "\n";
  return out;
}

std::string macroblocks_text(const Metadata& metadata) {
  if (!is_flashpack(metadata)) return "";
  Table macroblocks;
  macroblocks.add({"macroblock", "dtype", "offset", "elements", "size"});
  for (const Macroblock& macroblock : metadata.container.macroblocks) {
    const auto index = static_cast<std::size_t>(&macroblock - metadata.container.macroblocks.data());
    macroblocks.add({std::to_string(index), std::string(dtype_name(macroblock.dtype)),
                     std::to_string(macroblock.offset_bytes), std::to_string(macroblock.length_elems),
                     human_bytes(macroblock.length_bytes)});
  }
  return macroblocks.text(2) + "\n";
}

std::string text_report(const Metadata& metadata, const std::string& path) {
  std::string out = printable(path) + "\n\n" + summary_text(metadata) + "\n" + macroblocks_text(metadata);
  Table tensors;
  tensors.add({"tensor", "dtype", "shape", "offset", "size"});
  for (const TensorRecord& record : metadata.records) {
    tensors.add({record.name.empty() ? "\"\"" : printable(record.name), std::string(dtype_name(record.dtype)),
                 shape_text(record.shape), std::to_string(record.offset_bytes), human_bytes(record.size_bytes)});
  }
  out += tensors.text(3);
  for (const std::string& warning : metadata.warnings) out += "\nwarning: " + warning + "\n";
  return out;
}

/// Adds to a record's JSON where the tensor lies in its macroblock, which only flashpack files have.
void add_place_in_macroblock(boost::json::object& tensor, const Metadata& metadata, std::size_t i) {
  const TensorRecord& record = metadata.records[i];
  const std::uint32_t index = metadata.container.macroblock_of[i];
  const std::uint64_t width_bytes = flashpack::element_bytes(record.dtype);
  const std::uint64_t begin_bytes = metadata.container.macroblocks[index].offset_bytes;
  tensor["macroblock"] = index;
  tensor["offset_elems"] = (record.offset_bytes - begin_bytes) / width_bytes;
  tensor["length_elems"] = record.size_bytes / width_bytes;
}

boost::json::array tensors_json(const Metadata& metadata) {
  boost::json::array tensors;
  for (std::size_t i = 0; i < metadata.records.size(); ++i) {
    const TensorRecord& record = metadata.records[i];
    boost::json::object tensor = {{"name", record.name},
                                  {"dtype", dtype_name(record.dtype)},
                                  {"shape", boost::json::array(record.shape.begin(), record.shape.end())},
                                  {"offset_bytes", record.offset_bytes},
                                  {"size_bytes", record.size_bytes}};
    if (is_flashpack(metadata)) add_place_in_macroblock(tensor, metadata, i);
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

boost::json::array macroblocks_json(const Metadata& metadata) {
  boost::json::array macroblocks;
  for (const Macroblock& macroblock : metadata.container.macroblocks) {
    macroblocks.push_back({{"dtype", dtype_name(macroblock.dtype)},
                           {"offset_bytes", macroblock.offset_bytes},
                           {"length_bytes", macroblock.length_bytes},
                           {"length_elems", macroblock.length_elems}});
  }
  return macroblocks;
}

std::string json_report(const Metadata& metadata) {
  boost::json::object user_metadata;
  for (const auto& [key, value] : metadata.user_metadata) user_metadata.emplace(key, value);
  boost::json::object report = {{"format", format_text(metadata)},
                                {"file_bytes", metadata.identity.size_bytes},
                                {"has_checksums", metadata.checksums.has_value()},
                                {"metadata", std::move(user_metadata)},
                                {"tensors", tensors_json(metadata)},
                                {"warnings", boost::json::array(metadata.warnings.begin(), metadata.warnings.end())}};
  if (is_flashpack(metadata)) {
    report["payload_bytes"] = metadata.payload_bytes;
    report["align_bytes"] = metadata.container.align_bytes;
    report["total_elems"] = metadata.container.total_elems;
    report["macroblocks"] = macroblocks_json(metadata);
  }
  return boost::json::serialize(report) + "\n";
}

/// Keeps one line of a terminal's standard error up to date.
class ProgressLine {
 public:
  explicit ProgressLine(std::uint64_t total_bytes) : total_bytes_(total_bytes), shown_(::isatty(STDERR_FILENO) != 0) {}
  ~ProgressLine() {
    if (shown_) std::fputs("\r\x1b[K", stderr);
  }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void tell(std::uint64_t done_bytes) const {
    if (!shown_) return;
    std::fprintf(stderr, "\rverified %s of %s", human_bytes(done_bytes).c_str(), human_bytes(total_bytes_).c_str());
  }

 private:
  std::uint64_t total_bytes_;
  bool shown_;
};

std::string verify_text(const flashpack::VerifyReport& report, const Metadata& metadata) {
  std::array<char, 64> rate{};
  std::snprintf(rate.data(), rate.size(), " in %.2f s, %.2f GB/s", report.seconds,
                static_cast<double>(metadata.payload_bytes) / 1e9 / std::max(report.seconds, 1e-9));
  std::string out;
  for (const auto& stripe : report.corrupt) {
    out += "corrupt: bytes " + std::to_string(stripe.offset_bytes) + "+" + std::to_string(stripe.size_bytes) + ", of " +
           printable(stripe.tensors) + "\n";
  }
  out += report.corrupt.empty() ? "sound: " : std::to_string(report.corrupt.size()) + " stripes corrupt, sound: ";
  return out + exact_bytes(report.verified_bytes) + rate.data() + "\n";
}

std::string verify_json(const flashpack::VerifyReport& report) {
  boost::json::array corrupt;
  for (const auto& stripe : report.corrupt) {
    corrupt.push_back(
        {{"offset_bytes", stripe.offset_bytes}, {"size_bytes", stripe.size_bytes}, {"tensors", stripe.tensors}});
  }
  const boost::json::object object = {
      {"verified_bytes", report.verified_bytes}, {"corrupt", std::move(corrupt)}, {"seconds", report.seconds}};
  return boost::json::serialize(object) + "\n";
}

/// The descriptor stays open until the program ends, so that a file that is replaced meanwhile can still be read to its
/// end. Throws: std::system_error.
int open_file(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0) throw std::system_error(errno, std::generic_category(), "open " + path);
  return fd;
}

/// A reader that closes the pipe early, like head(1), is no failure. Throws: std::system_error for other failures.
void write_stdout(const std::string& text) {
  std::signal(SIGPIPE, SIG_IGN);
  const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
  if (!written && errno != EPIPE) throw std::system_error(errno, std::generic_category(), "write standard output");
}

int verify_file(int fd, const std::string& path, const Metadata& metadata, bool json) {
  flashpack::Engine engine;
  flashpack::VerifyReport report;
  {
    const ProgressLine line(metadata.payload_bytes);
    report = verify_payload(engine, fd, path, metadata, [&](std::uint64_t done_bytes) { line.tell(done_bytes); });
  }
  write_stdout(json ? verify_json(report) : verify_text(report, metadata));
  return report.corrupt.empty() ? 0 : kExitBadFile;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(kDescription, "flashpack_inspect");
  app.footer(kFooter);
  std::string path;
  bool json = false;
  bool verify = false;
  app.add_option("FILE", path, "The file to look at")->required();
  app.add_flag("--json", json, "Write one JSON object for programs: every macroblock and tensor, sizes in bytes");
  app.add_flag("--verify", verify, "Read all tensors, at disk speed, and tell which do not match their checksums");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  try {
    const int fd = open_file(path);
    const Metadata metadata = flashpack::read_metadata(fd, path);
    if (verify) return verify_file(fd, path, metadata, json);
    write_stdout(json ? json_report(metadata) : text_report(metadata, path));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "flashpack_inspect: %s\n", printable(error.what()).c_str());
    return kExitBadFile;
  }
}
