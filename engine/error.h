#pragma once

#include "engine/ground/error.h"
