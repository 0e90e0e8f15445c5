#include "fastft/api.h"
#include "fastft/status.h"

const char* ft_last_error() { return fastft::error_buffer(); }
