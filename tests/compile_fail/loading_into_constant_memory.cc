#include "flashpack/engine.h"

#ifdef MISUSE
using Memory = const void*;
#else
using Memory = void*;
#endif

flashpack::Extent extent_of(Memory memory) { return {.offset_bytes = 0, .size_bytes = 1, .target = memory}; }
