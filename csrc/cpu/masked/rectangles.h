// Checking what the trained part of a weight is before anything is written.
#pragma once
#include "fastft/masked.h"

namespace fastft {

// Fails, as FT_CHECK does, unless the offsets ascend and all rectangles lie within the weight and
// on a grid of their own size, so that they neither overlap nor leave it.
int check_rectangles(const char* name, const Rectangles& r, int threads);

}  // namespace fastft
