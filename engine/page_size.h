#pragma once

#include "engine/ground/pages.h"
