/// An engine, a directory that vanishes, and comparison by bytes.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include "flashpack/format.h"
#include "flashpack/torch.h"

namespace flashpack::test {

inline bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const at::Tensor left = a.detach().resolve_conj().resolve_neg().contiguous();
  const at::Tensor right = b.detach().resolve_conj().resolve_neg().contiguous();
  return left.nbytes() == 0 || std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.nbytes()) == 0;
}

inline std::string file_content(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline std::vector<std::string> names_of(const StateDict& tensors) {
  std::vector<std::string> names;
  for (const auto& each : tensors) names.push_back(each.first);
  return names;
}

/// The Error that `action` throws; a default one and a failure when it does not.
inline Error error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return Error({}, "");
}

inline void flip_bit(const std::filesystem::path& path, std::uint64_t bit) {
  std::fstream stream(path, std::ios::in | std::ios::out | std::ios::binary);
  stream.seekg(static_cast<std::streamoff>(bit / 8));
  const auto byte = static_cast<char>(stream.get() ^ (1 << bit % 8));
  stream.seekp(static_cast<std::streamoff>(bit / 8));
  stream.put(byte);
}

#define EXPECT_MENTIONS(error, text) \
  EXPECT_NE(std::string((error).what()).find(text), std::string::npos) << (error).what()

/// While it lives, the process can map at most `more_bytes` beyond what it has now.
class AddressSpaceLimit {
 public:
  explicit AddressSpaceLimit(std::uint64_t more_bytes) {
    std::uint64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    getrlimit(RLIMIT_AS, &old_);
    const rlimit tight{pages * 4096 + more_bytes, old_.rlim_max};
    setrlimit(RLIMIT_AS, &tight);
  }
  ~AddressSpaceLimit() { setrlimit(RLIMIT_AS, &old_); }

 private:
  rlimit old_{};
};

class TorchTest : public ::testing::Test {
 protected:
  TorchTest() {
    std::string pattern = (std::filesystem::temp_directory_path() / "flashpack_torch_XXXXXX").string();
    directory_ = mkdtemp(pattern.data());
  }
  ~TorchTest() override { std::filesystem::remove_all(directory_); }

  std::filesystem::path file(const std::string& name = "model.flashpack") const { return directory_ / name; }

  void pack(const StateDict& tensors, const PackOptions& options = {}) {
    pack_to_file(engine_, tensors, file(), options);
  }

  at::Tensor read_one(const std::string& name) {
    auto loaded = read_tensors(engine_, file(), {.only = NameFilter{.names = {name}}});
    EXPECT_EQ(loaded.tensors.size(), 1U);
    return loaded.tensors.at(0).second;
  }

  std::filesystem::path directory_;
  Engine engine_;
};

}  // namespace flashpack::test
