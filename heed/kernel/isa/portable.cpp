#define HEED_ISA portable
#include "heed/kernel/isa/table.h"
