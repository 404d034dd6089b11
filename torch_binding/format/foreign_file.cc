#include "torch_binding/format/foreign_file.h"

#include <algorithm>
#include <array>

namespace flashpack {

namespace {

using std::string_view_literals::operator""sv;

struct Kind {
  std::string_view begin;  ///< In lower case.
  const char* sentence;
};

constexpr const char* kPage =
    "it is a web page, which its server sent instead of the file: download it again, with the login that it may need";
constexpr const char* kPickle = "as torch.save writes them: \"flashpack convert\" makes a flashpack file of it";
constexpr const char* kCompressed = "it is compressed: unpack it first";

constexpr std::array kKinds = {
    Kind{"version https://git-lfs"sv, "it is a pointer of git-lfs, and \"git lfs pull\" fetches the file"},
    Kind{"<!doctype html"sv, kPage},
    Kind{"<html"sv, kPage},
    Kind{"<?xml"sv, "it is XML, such as the error message of a server: download it again"},
    Kind{"pk\3\4"sv, kPickle},
    Kind{"\x80\2"sv, kPickle},
    Kind{"\x80\3"sv, kPickle},
    Kind{"\x80\4"sv, kPickle},
    Kind{"\x80\5"sv, kPickle},
    Kind{"gguf"sv, "it is a GGUF file, for llama.cpp: the safetensors files of the same model are what is needed"},
    Kind{"\x89hdf\r\n"sv, "it is an HDF5 file, as Keras writes them: its own library reads it"},
    Kind{"\x93numpy"sv, "it is an array of numpy: numpy.load reads it"},
    Kind{"\x1f\x8b"sv, kCompressed},
    Kind{"\x28\xb5\x2f\xfd"sv, kCompressed},
    Kind{"\xfd"
         "7zxz\0"sv,
         kCompressed},
    Kind{"\xef\xbb\xbf"sv, "it begins with a byte order mark: save it as UTF-8 without one"},
    Kind{"\xff\xfe"sv, "it is text in UTF-16: save it as UTF-8"},
    Kind{"\xfe\xff"sv, "it is text in UTF-16: save it as UTF-8"},
    Kind{"{"sv, "it is JSON text, such as the configuration of a model; an index of files is called *.index.json"},
};

/// Other characters than those of ASCII are left aside, because bytes of numbers look like them.
bool is_text(char c) { return (c >= 0x20 && c < 0x7f) || c == '\t' || c == '\n' || c == '\r'; }

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c; }

/// Names the two that torch.save writes apart, because people know them by these words.
std::string sentence_of(const Kind& kind) {
  if (kind.sentence != kPickle) return kind.sentence;
  return (kind.begin.front() == 'p' ? "it is a zip archive, " : "it is a pickle, ") + std::string(kPickle);
}

}  // namespace

std::string what_it_is(std::string_view head) {
  if (head.empty()) return "it is empty: what should have written or downloaded it has failed";
  head = head.substr(0, kForeignHeadBytes);
  if (std::ranges::all_of(head, [](char c) { return c == '\0'; }))
    return "it begins with zeros, as a file whose download was not finished";
  std::string begin(head.substr(std::min(head.find_first_not_of(" \t\r\n"), head.size())));
  std::ranges::transform(begin, begin.begin(), lower);
  const auto kind = std::ranges::find_if(kKinds, [&](const Kind& each) { return begin.starts_with(each.begin); });
  if (kind != kKinds.end()) return sentence_of(*kind);
  return std::ranges::all_of(head, is_text) ? "it is a text" : "";
}

}  // namespace flashpack
