#include <gtest/gtest.h>

#if __has_include(<nvtx3/nvToolsExt.h>)
#define NVTX_NO_IMPL  // The types alone: this is the other side of NVTX.
#include <nvtx3/nvToolsExt.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;

/// A profiler: NVTX calls it in place of one that is attached.
struct Profiler {
  std::mutex mutex;  // Protects the rest.
  std::vector<std::string> domains;
  std::map<nvtxRangeId_t, std::string> open;
  std::vector<std::string> ended;
  nvtxRangeId_t last = 0;

  static Profiler& get() {
    static Profiler profiler;
    return profiler;
  }
};

nvtxDomainHandle_t create_domain(const char* name) {
  Profiler& profiler = Profiler::get();
  const std::lock_guard lock(profiler.mutex);
  profiler.domains.emplace_back(name);
  return reinterpret_cast<nvtxDomainHandle_t>(&profiler);
}

nvtxRangeId_t start_range(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* attributes) {
  Profiler& profiler = Profiler::get();
  const std::lock_guard lock(profiler.mutex);
  EXPECT_EQ(domain, reinterpret_cast<nvtxDomainHandle_t>(&profiler));
  profiler.open[++profiler.last] = attributes->message.ascii;
  return profiler.last;
}

void end_range(nvtxDomainHandle_t, nvtxRangeId_t range) {
  Profiler& profiler = Profiler::get();
  const std::lock_guard lock(profiler.mutex);
  const auto found = profiler.open.find(range);
  ASSERT_NE(found, profiler.open.end());
  profiler.ended.push_back(found->second);
  profiler.open.erase(found);
}

template <class Function>
void put(NvtxFunctionTable table, NvtxCallbackIdCore2 id, Function* function) {
  *table[id] = reinterpret_cast<NvtxFunctionPointer>(function);
}

int attach(NvtxGetExportTableFunc_t export_table) {
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(export_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (!callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  put(table, NVTX_CBID_CORE2_DomainCreateA, &create_domain);
  put(table, NVTX_CBID_CORE2_DomainRangeStartEx, &start_range);
  put(table, NVTX_CBID_CORE2_DomainRangeEnd, &end_range);
  return 1;
}

TEST(ProfilerRanges, AProfilerSeesEachTransferUntilItHasEnded) {
  const testing::TempDir directory;
  const std::vector<std::byte> bytes(10'000, std::byte{7});
  const std::string path = directory.path() / "model";
  const std::string missing = directory.path() / "missing";
  {
    Engine engine({.workers = 2});
    FileWriter writer = engine.create(path);
    writer.write({.extents = {{.offset_bytes = 0, .size_bytes = bytes.size(), .source = bytes.data()}}});
    writer.commit();
    GuardedMemory memory(bytes.size());
    engine.load({.files = {{.path = path, .extents = {{0, memory.size(), memory.data()}}}}});
    EXPECT_THROW(engine.load({.files = {{.path = missing, .extents = {{0, memory.size(), memory.data()}}}}}), Error);
  }
  Profiler& profiler = Profiler::get();
  EXPECT_EQ(profiler.domains, std::vector<std::string>{"flashpack"});
  EXPECT_EQ(profiler.ended, (std::vector<std::string>{"write " + path, "read " + path, "read " + missing}));
  EXPECT_TRUE(profiler.open.empty());
}

}  // namespace
}  // namespace flashpack

// NVTX looks for this name.
extern "C" {
extern NvtxInitializeInjectionNvtxFunc_t InitializeInjectionNvtx2_fnptr;
NvtxInitializeInjectionNvtxFunc_t InitializeInjectionNvtx2_fnptr = &flashpack::attach;
}

#else

TEST(ProfilerRanges, AreTestedWithNvtx) { GTEST_SKIP() << "the headers of NVTX are not here"; }

#endif
