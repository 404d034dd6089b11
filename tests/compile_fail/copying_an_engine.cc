#include "flashpack/engine.h"

flashpack::Engine second_owner(flashpack::Engine& engine) {
#ifdef MISUSE
  return engine;
#else
  return std::move(engine);
#endif
}
