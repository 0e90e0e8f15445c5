// Which level of the instruction set runs.
#pragma once
#include <cstdint>

#include "fastft/api.h"

namespace fastft {

// The level in use: the highest that this CPU and operating system run, capped by
// PYFASTFT_CPU_ISA and by ft_cpu_set_isa.
int active_isa();

}  // namespace fastft
