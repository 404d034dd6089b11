#include "torch_binding/format/foreign_file.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace flashpack {
namespace {

TEST(ForeignFile, IsNamedByItsBeginningWithTheCure) {
  const std::vector<std::pair<std::string, std::string>> kinds = {
      {"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n", "\"git lfs pull\" fetches the file"},
      {"\n <!DOCTYPE html><html>404 Not Found</html>", "it is a web page"},
      {"<HTML><body>sign in first</body></HTML>", "download it again, with the login that it may need"},
      {"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
       "it is XML, such as the error message of a server"},
      {std::string("PK\3\4\0\0\0\0", 8) + "archive/data.pkl",
       "it is a zip archive, as torch.save writes them: \"flash"},
      {"\x80\4\x95\1", "it is a pickle, as torch.save writes them"},
      {"\x80\2}q\1X\1aq\2K\1s.", "it is a pickle, as torch.save writes them: \"flashpack convert\""},
      {std::string("GGUF\3\0\0\0", 8) + "general.architecture", "it is a GGUF file"},
      {"\x89HDF\r\n\x1a\n", "it is an HDF5 file"},
      {"\x93NUMPY\1", "numpy.load reads it"},
      {"\x1f\x8b\b", "it is compressed: unpack it first"},
      {"\x28\xb5\x2f\xfd\1", "it is compressed: unpack it first"},
      {"\xef\xbb\xbf{}", "it begins with a byte order mark: save it as UTF-8 without one"},
      {"\xff\xfe{", "it is text in UTF-16: save it as UTF-8"},
      {R"({"hidden_size": 16})", "it is JSON text, such as the configuration of a model"},
      {std::string(100, '\0'), "it begins with zeros, as a file whose download was not finished"},
      {"", "it is empty"},
      {"notes of a meeting\n", "it is a text"}};
  for (const auto& [head, expected] : kinds)
    EXPECT_NE(what_it_is(head).find(expected), std::string::npos) << what_it_is(head);
}

TEST(ForeignFile, OfWhichNothingIsKnownGetsNoName) {
  EXPECT_EQ(what_it_is(std::string(100, '\1')), "");
  EXPECT_EQ(what_it_is(std::string("notes\0", 6)), "");
  EXPECT_EQ(what_it_is("\x9f\xa4>?\x81\x8f\x99>"), "");
}

TEST(ForeignFile, IsJudgedByItsBeginningAlone) {
  EXPECT_EQ(what_it_is(std::string(kForeignHeadBytes, 'x') + '\1'), "it is a text");
  EXPECT_EQ(what_it_is(std::string(kForeignHeadBytes - 1, 'x') + '\1'), "");
}

}  // namespace
}  // namespace flashpack
