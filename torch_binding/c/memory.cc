#include "torch_binding/c/arguments.h"
#include "torch_binding/c/errors.h"
#include "torch_binding/c/handles.h"

using namespace flashpack::c;

flashpack_status flashpack_memory_create(flashpack_engine* engine, size_t size_bytes, uint64_t offset_bytes,
                                         flashpack_memory** memory, flashpack_error** error) {
  return guarded(error, [&] {
    auto*& result = result_of(memory, "memory");
    const flashpack::HostMemoryPool& pool = require(engine, "engine").engine->options().memory_pool;
    result = new flashpack_memory{flashpack::HostMemory(pool, size_bytes, offset_bytes)};
  });
}

void* flashpack_memory_data(const flashpack_memory* memory) { return memory ? memory->memory.data() : nullptr; }

void flashpack_memory_destroy(flashpack_memory* memory) { delete memory; }

void flashpack_memory_release_kept(flashpack_engine* engine) {
  if (engine) engine->engine->options().memory_pool.release_kept();
}
