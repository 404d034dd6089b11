// Loads the file that quickstart.py packed, cold and from the page cache, writes it again, compares every bit, and
// assigns it to a LibTorch module, which it then runs.
#include <ATen/ops/arange.h>
#include <c10/core/InferenceMode.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "flashpack/torch.h"
#include "tools/minilm.h"

namespace {

namespace fs = std::filesystem;
using flashpack::StateDict;
// Drops the file from the page cache where `drop`; returns the percentage of it that is there afterwards.
double cached_percent(const fs::path& path, bool drop) {
  const auto check = [&](bool ok) {
    if (!ok) throw std::system_error(errno, std::generic_category(), "look into the page cache for " + path.string());
  };
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  check(file >= 0);
  // Pages are written back first, because dirty ones cannot be dropped. Failures show in the result of mincore.
  if (drop && fsync(file) == 0) posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
  const std::size_t size_bytes = fs::file_size(path);
  void* const mapping = mmap(nullptr, size_bytes, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  check(mapping != MAP_FAILED);
  const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages((size_bytes + page_bytes - 1) / page_bytes);
  check(mincore(mapping, size_bytes, pages.data()) == 0);
  munmap(mapping, size_bytes);
  const auto resident = std::ranges::count_if(pages, [](unsigned char page) { return (page & 1) != 0; });
  return 100.0 * static_cast<double>(resident) / static_cast<double>(pages.size());
}

flashpack::LoadedTensors load(flashpack::Engine& engine, const fs::path& path, const char* what) {
  auto loaded = read_tensors(engine, path);
  const flashpack::TransferStats& stats = loaded.stats;
  const double gigabytes = static_cast<double>(stats.requested_bytes) / 1e9;
  const double direct = static_cast<double>(stats.direct_bytes);
  std::printf("  %-11s %zu tensors, %.1f MB in %.1f ms, %.2f GB/s; %.0f %% past the page cache (%s)\n", what,
              loaded.tensors.size(), gigabytes * 1e3, stats.seconds * 1e3, gigabytes / stats.seconds,
              100 * direct / (direct + static_cast<double>(stats.buffered_bytes)), flashpack::to_string(stats.backend));
  if (!stats.fallback_reason.empty()) std::printf("  %-11s %s\n", "", stats.fallback_reason.c_str());
  return loaded;
}

void require(bool ok, const std::string& otherwise) {
  if (!ok) throw std::runtime_error(otherwise);
}

void require_same(StateDict a, StateDict b, const std::string& what) {
  const auto name = [](const StateDict::value_type& each) { return each.first; };
  std::ranges::sort(a, {}, name);
  std::ranges::sort(b, {}, name);
  require(std::ranges::equal(a, b, {}, name, name), what + " has other names");
  for (std::size_t i = 0; i < a.size(); ++i) {
    const at::Tensor &x = a[i].second, &y = b[i].second;
    const bool same = x.scalar_type() == y.scalar_type() && x.sizes() == y.sizes() && x.is_contiguous() &&
                      y.is_contiguous() && std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
    require(same, what + " differs in " + a[i].first);
  }
}

// Proves the tensors right without Python: written again, they give the same file.
void require_same_when_written(flashpack::Engine& engine, const StateDict& tensors, const fs::path& path) {
  const fs::path copy = path.string() + ".cpp";
  pack_to_file(engine, tensors, copy);
  using Bytes = std::istreambuf_iterator<char>;
  std::ifstream original(path, std::ios::binary), written(copy, std::ios::binary);
  const bool same = std::equal(Bytes(original), Bytes(), Bytes(written), Bytes());
  fs::remove(copy);
  require(same, "what C++ writes differs from " + path.string());
}

void run(const fs::path& path) {
  flashpack::Engine engine;
  const double left = cached_percent(path, true);
  if (left > 0) std::printf("  not cold:   %.1f %% of the file stayed in the page cache\n", left);
  const auto cold = load(engine, path, left > 0 ? "not cold" : "cold");
  read_tensors(engine, path, {.cache = flashpack::CachePolicy::kBuffered});
  std::printf("  page cache  %.1f %% of the file before the first load, %.1f %% before the second\n", left,
              cached_percent(path, false));
  const auto cached = load(engine, path, "from cache");
  require_same(cold.tensors, cached.tensors, "the load from the page cache");
  require_same_when_written(engine, cold.tensors, path);
  std::printf("  compared    the loads are bit-equal; packed from C++, they give the same file byte for byte\n");

  const c10::InferenceMode inference;
  const auto model =
      quickstart::MiniLmImpl::from_flashpack(engine, path, {.strict_params = true, .strict_buffers = true});
  const StateDict assigned = state_dict(*model);
  require_same(cold.tensors, assigned, "the assigned module");
  const at::Tensor hidden = model->embeddings->forward(at::arange(2000, 2008).unsqueeze(0));
  require(hidden.isfinite().all().item<bool>(), "the module computes what is not finite");
  std::printf("  assigned    to a module of %zu tensors, bit-equal; 8 tokens, embedded: [%lld, %lld, %lld]\n",
              assigned.size(), static_cast<long long>(hidden.size(0)), static_cast<long long>(hidden.size(1)),
              static_cast<long long>(hidden.size(2)));
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::fprintf(stderr, "usage: quickstart_cpp FILE\n");
    return 2;
  }
  std::printf("C++ and LibTorch: %s\n", argv[1]);
  run(argv[1]);
} catch (const std::exception& error) {
  std::fprintf(stderr, "quickstart_cpp: %s\n", error.what());
  return 1;
}
