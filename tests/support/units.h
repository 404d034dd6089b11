#pragma once

#include "engine/ground/units.h"

namespace flashpack::testing {
using internal::kMiB;
}
