#include "flashpack/flashpack.h"
