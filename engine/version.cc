#include "flashpack/version.h"

namespace flashpack {

const char* version() noexcept { return FLASHPACK_VERSION_STRING; }

}  // namespace flashpack
