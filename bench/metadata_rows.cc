#include <fstream>
#include <stdexcept>

#include "bench/program.h"
#include "bench/rows.h"
#include "bench/support/instant_pipeline.h"
#include "flashpack/checkpoint.h"
#include "flashpack/format.h"

namespace flashpack::bench {
namespace {

constexpr std::int64_t kElements = 32;
constexpr std::uint64_t kTensorBytes = kElements * 4;

std::vector<TensorSpec> small_tensors(std::size_t count) {
  std::vector<TensorSpec> tensors;
  for (std::size_t i = 0; i < count; ++i)
    tensors.push_back({"model.layers." + std::to_string(i) + ".norm.weight", DType::kFloat32, {kElements}});
  return tensors;
}

std::string safetensors_header(const std::vector<TensorSpec>& tensors) {
  std::string json = "{";
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    json += (i > 0 ? ",\"" : "\"") + tensors[i].name + R"(":{"dtype":"F32","shape":[)" + std::to_string(kElements) +
            R"(],"data_offsets":[)" + std::to_string(i * kTensorBytes) + "," + std::to_string((i + 1) * kTensorBytes) +
            "]}";
  }
  return json + "}";
}

/// A checkpoint of many small tensors of zeros, which the destructor removes.
class SmallTensors {
 public:
  SmallTensors(const Setup& setup, FileFormat format, std::size_t count) : tensors_(small_tensors(count)) {
    path_ = setup.checkpoint.path();
    path_ += format == FileFormat::kFlashPack ? ".small.flashpack" : ".small.safetensors";
    std::ofstream file(path_, std::ios::binary);
    const std::string payload(count * kTensorBytes, '\0');
    if (format == FileFormat::kFlashPack) {
      file << payload << encode_footer(make_layout(tensors_, kTensorBytes));
    } else {
      const std::string header = safetensors_header(tensors_);
      const std::uint64_t length = header.size();
      file.write(reinterpret_cast<const char*>(&length), sizeof(length)) << header << payload;
    }
    if (!file.flush()) throw std::runtime_error("cannot write " + path_.string());
  }
  SmallTensors(const SmallTensors&) = delete;
  SmallTensors& operator=(const SmallTensors&) = delete;
  ~SmallTensors() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }

  const std::filesystem::path& path() const { return path_; }

  void check(const flashpack::Checkpoint& opened) const {
    if (opened.size() != tensors_.size()) throw std::runtime_error("wrong number of tensors");
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      const TensorRecord& record = opened.record(i);
      const std::uint64_t offset = opened.record(0).offset_bytes + i * kTensorBytes;
      if (record.name != tensors_[i].name || record.shape != tensors_[i].shape || record.offset_bytes != offset)
        throw std::runtime_error("wrong record of " + tensors_[i].name);
    }
  }

 private:
  std::vector<TensorSpec> tensors_;
  std::filesystem::path path_;
};

// Runs `work` and shows its time, and the median of that time for each tensor.
template <class Work>
void time_tensors(benchmark::State& state, std::size_t tensors, int repeats, Work work) {
  std::vector<double> milliseconds;
  for (auto _ : state) {
    const Sample sample = measure([&] {
      for (int i = 0; i < repeats; ++i) work();
    });
    milliseconds.push_back(sample.seconds * 1e3 / repeats);
    state.SetIterationTime(sample.seconds / repeats);
  }
  show(state, "", "ms", summarize(milliseconds));
  state.counters["us/tensor"] = median(milliseconds) * 1e3 / static_cast<double>(tensors);
}

void bench_open(benchmark::State& state, const Setup& setup, FileFormat format, std::size_t tensors) {
  const SmallTensors file(setup, format, tensors);
  file.check(open_checkpoint(file.path()));
  const int repeats = tensors > 10'000 ? 1 : 100;
  time_tensors(state, tensors, repeats, [&] { benchmark::DoNotOptimize(open_checkpoint(file.path())); });
}

// Measures a load of all tensors, each into memory of its own, by a pipeline that moves no bytes: what is left is the
// check of the request, the plan, and the driver's work.
void bench_plan(benchmark::State& state, const Setup& setup, std::size_t tensors) {
  const SmallTensors file(setup, FileFormat::kFlashPack, tensors);
  const flashpack::Checkpoint opened = open_checkpoint(file.path());
  InstantPipeline pipeline;
  time_tensors(state, tensors, 1, [&] {
    FileExtents wanted{.path = file.path()};
    for (std::size_t i = 0; i < opened.size(); ++i) {
      const TensorRecord& record = opened.record(i);
      wanted.extents.push_back(
          {record.offset_bytes, record.size_bytes, setup.touched.data() + 2 * record.offset_bytes});
    }
    pipeline.load({.files = {std::move(wanted)}, .cache = CachePolicy::kDirect});
  });
}

}  // namespace

void register_metadata_rows(const Setup& setup, int rounds) {
  for (const FileFormat format : {FileFormat::kFlashPack, FileFormat::kSafetensors}) {
    for (const std::size_t tensors : {10u, 1'000u, 100'000u}) {
      add_rounds("open/" + std::string(format_name(format)) + "/" + std::to_string(tensors), rounds,
                 [=, &setup](benchmark::State& state) { bench_open(state, setup, format, tensors); });
    }
  }
  add_rounds("plan/100000", rounds, [&](benchmark::State& state) { bench_plan(state, setup, 100'000); });
}

}  // namespace flashpack::bench
