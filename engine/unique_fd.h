#pragma once

#include "engine/ground/unique_fd.h"
