#include <torch/nn/module.h>

#include <cstdint>
#include <map>
#include <numeric>

#include "flashpack/checkpoint.h"
#include "tests/libtorch/modules.h"
#include "tests/libtorch/torch_fixture.h"
#include "torch_binding/libtorch/tensors.h"

namespace flashpack {
namespace {

using test::error_of;
using test::names_of;
using test::NetImpl;
using test::same_bytes;
using test::TorchTest;

/// The names that safetensors has for dtypes.
const std::map<at::ScalarType, std::string> kSafetensorsNames = {{at::kFloat, "F32"},
                                                                 {at::kDouble, "F64"},
                                                                 {at::kHalf, "F16"},
                                                                 {at::kBFloat16, "BF16"},
                                                                 {at::kByte, "U8"},
                                                                 {at::kLong, "I64"},
                                                                 {at::kBool, "BOOL"},
                                                                 {at::kComplexFloat, "C64"},
                                                                 {at::kInt, "I32"},
                                                                 {at::kFloat8_e5m2, "F8_E5M2"},
                                                                 {at::kFloat8_e4m3fn, "F8_E4M3"}};

/// Writes a safetensors file without the padding of its own writer, so that the payload may begin anywhere.
void write_safetensors(const std::filesystem::path& path, const StateDict& tensors, const std::string& padding = "") {
  std::string json = "{";
  std::string payload;
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor values = tensor.detach().contiguous();
    std::string shape;
    for (const std::int64_t dim : values.sizes()) shape += (shape.empty() ? "" : ",") + std::to_string(dim);
    json += (json.size() > 1 ? ",\"" : "\"") + name + R"(":{"dtype":")" + kSafetensorsNames.at(values.scalar_type()) +
            R"(","shape":[)" + shape + R"(],"data_offsets":[)" + std::to_string(payload.size());
    payload.append(static_cast<const char*>(values.const_data_ptr()), values.nbytes());
    json += "," + std::to_string(payload.size()) + "]}";
  }
  json += "}" + padding;
  const std::uint64_t json_bytes = json.size();
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&json_bytes), sizeof json_bytes) << json << payload;
}

bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) % c10::elementSize(tensor.scalar_type()) == 0;
}

class Safetensors : public TorchTest {
 protected:
  static StateDict some_tensors() {
    StateDict tensors = {{"scalar", at::scalar_tensor(7, at::kLong)}, {"empty", at::empty({0, 3})}};
    for (const auto& [type, name] : kSafetensorsNames)
      tensors.emplace_back(name, at::randint(0, 2, {7, 3}, at::kByte).to(type));
    return tensors;
  }

  static void expect_equal(const StateDict& loaded, const StateDict& expected) {
    ASSERT_EQ(names_of(loaded), names_of(expected));
    for (std::size_t i = 0; i < loaded.size(); ++i)
      EXPECT_TRUE(same_bytes(loaded[i].second, expected[i].second)) << loaded[i].first;
  }
};

TEST_F(Safetensors, TensorsAreReadAndAlignedWhereverThePayloadBegins) {
  const StateDict saved = some_tensors();
  for (std::size_t spaces = 0; spaces < 16; ++spaces) {
    write_safetensors(file(), saved, std::string(spaces, ' '));
    const StateDict loaded = read_tensors(engine_, file()).tensors;
    expect_equal(loaded, saved);
    for (const auto& [name, tensor] : loaded) EXPECT_TRUE(is_aligned(tensor)) << name << " after " << spaces;
  }
}

TEST_F(Safetensors, LargeTensorsAreReadInPlace) {
  write_safetensors(file(), {{"large", at::ones({3 << 20})}, {"small", at::ones({5})}});
  const auto offset = read_metadata(file()).records[0].offset_bytes;
  write_safetensors(file(), {{"large", at::ones({3 << 20})}, {"small", at::ones({5})}},
                    std::string(8 - offset % 8, ' '));
  const TransferStats stats = read_tensors(engine_, file(), {.cache = CachePolicy::kDirect}).stats;
  EXPECT_LE(stats.staged_bytes, 2 * 4096U) << "more than the ends went through a copy";
}

TEST_F(Safetensors, AModuleIsAssignedFromThem) {
  const NetImpl saved;
  write_safetensors(file(), state_dict(saved));
  NetImpl net;
  const AssignReport report = assign_from_file(engine_, net, file());
  EXPECT_EQ(report.assigned, names_of(state_dict(net)));
  expect_equal(state_dict(net), state_dict(saved));
}

/// Several files in a directory, and their index.
class Sharded : public Safetensors {
 protected:
  /// Writes every other tensor to the one file, the rest to the other.
  void write_shards(const StateDict& tensors, const std::string& wrong_name = "") const {
    StateDict parts[2];
    std::string map;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const auto& [name, tensor] = tensors[i];
      parts[i % 2].emplace_back(name, tensor);
      map += (map.empty() ? "\"" : ",\"") + (i == 0 && !wrong_name.empty() ? wrong_name : name) + R"(":")" +
             shard(i % 2) + '"';
    }
    for (std::size_t i = 0; i < 2; ++i) write_safetensors(directory_ / shard(i), parts[i]);
    std::ofstream(index()) << R"({"weight_map":{)" << map << "}}";
  }
  static std::string shard(std::size_t i) { return "model-0000" + std::to_string(i + 1) + "-of-00002.safetensors"; }
  std::filesystem::path index() const { return directory_ / "model.safetensors.index.json"; }
};

TEST_F(Sharded, FilesAreReadThroughTheirIndexOrTheirDirectory) {
  const StateDict saved = some_tensors();
  write_shards(saved);
  for (const auto& path : {index(), directory_}) {
    std::map<std::string, at::Tensor> loaded;
    for (auto& [name, tensor] : read_tensors(engine_, path).tensors) loaded.emplace(name, tensor);
    EXPECT_EQ(loaded.size(), saved.size());
    for (const auto& [name, tensor] : saved) EXPECT_TRUE(same_bytes(loaded.at(name), tensor)) << name;
  }
}

TEST_F(Sharded, AModuleIsAssignedFromAllFilesAtOnce) {
  const NetImpl saved;
  write_shards(state_dict(saved));
  NetImpl net;
  const AssignReport report = assign_from_file(engine_, net, directory_);
  EXPECT_EQ(report.assigned, names_of(state_dict(net)));
  expect_equal(state_dict(net), state_dict(saved));
}

TEST_F(Sharded, AModuleIsUntouchedIfTheIndexOrAFileIsWrong) {
  const NetImpl saved;
  NetImpl net;
  StateDict before;
  for (const auto& [name, tensor] : state_dict(net)) before.emplace_back(name, tensor.clone());
  write_shards(state_dict(saved), "absent.weight");
  EXPECT_MENTIONS(error_of([&] { assign_from_file(engine_, net, directory_); }), "\"absent.weight\"");
  write_shards(state_dict(saved));
  std::filesystem::resize_file(directory_ / shard(1), std::filesystem::file_size(directory_ / shard(1)) - 1);
  const Error error = error_of([&] { assign_from_file(engine_, net, directory_); });
  EXPECT_EQ(error.code(), Errc::kBadFile);
  EXPECT_EQ(error.path(), directory_ / shard(1));
  expect_equal(state_dict(net), before);
}

TEST_F(Sharded, AFileThatChangesBetweenItsHeaderAndItsPayloadIsNamed) {
  write_shards(some_tensors());
  const Checkpoint checkpoint = open_checkpoint(directory_);
  std::ofstream(directory_ / shard(1), std::ios::app) << 'x';
  std::vector<std::size_t> wanted(checkpoint.size());
  std::iota(wanted.begin(), wanted.end(), std::size_t{0});
  const Error error = error_of([&] { LoadedRecords(engine_, checkpoint, wanted, CachePolicy::kAuto, Verify::kAuto); });
  EXPECT_EQ(error.code(), Errc::kFileChanged);
  EXPECT_EQ(error.path(), directory_ / shard(1));
}

TEST_F(Safetensors, HaveNoChecksumsToVerify) {
  write_safetensors(file(), {{"x", at::ones({3})}});
  EXPECT_EQ(read_tensors(engine_, file()).stats.verified_bytes, 0U);
  EXPECT_MENTIONS(error_of([&] { read_tensors(engine_, file(), {.verify = Verify::kAlways}); }), "no checksums");
}

}  // namespace
}  // namespace flashpack
