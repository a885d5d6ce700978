#define HEED_ISA amx
#define HEED_TILES
#include "heed/kernel/isa/table.h"
