#define HEED_ISA avx2
#include "heed/kernel/isa/table.h"
