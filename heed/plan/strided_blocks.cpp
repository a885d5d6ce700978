#include "heed/plan/strided_blocks.h"

namespace heed {

double StridedBlocks::coverage(Index n) const {
  // A column that no head owns is seen from `local` rows only; any other from all.
  Index unseen = 0;
  for (Index j = 0; j + local < n; ++j) {
    bool owned = false;
    for (Index head = 0; head < heads && !owned; ++head) owned = owns(head, j);
    if (!owned) unseen += n - local - j;
  }
  const Index pairs = n * (n + 1) / 2;
  return static_cast<double>(pairs - unseen) / static_cast<double>(pairs);
}

}  // namespace heed
