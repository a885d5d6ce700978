#define HEED_ISA avx512
#include "heed/kernel/isa/table.h"
