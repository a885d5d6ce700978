// How memory is asked for.
#pragma once

#include "heed/base/types.h"

namespace heed {

/// Wishes for large pages behind memory that was reserved, is not touched yet and is soon filled: a fault for each
/// small page takes longer than some plans compute of what it holds. Where the system refuses, pages stay small.
void ask_for_large_pages(void* data, Index bytes);

}  // namespace heed
