// A call of every mechanism that runs on a model.
#pragma once

#include <map>
#include <string>

namespace heed::test {

// Calls that leave much out of 300 tokens, for every mechanism that runs on a model without a calibration.
inline const std::map<std::string, std::string>& sparse_calls() {
  static const std::map<std::string, std::string> calls{
      {"dense", "dense"},
      {"streaming", "streaming:sink=2,window=20"},
      {"moba", "moba:block=16,top_k=3,sink=4"},
      {"flash-moba", "flash-moba:block=16,top_k=3"},
      {"power", "power:block=16,window_blocks=2"},
      {"s2", "s2:block=16,local_blocks=2,stride_blocks=3,allow_partial=true"},
      {"moa", "moa:block=16,sink=16,min_span=32,alpha=0,beta=0.2"},
      {"hip", "hip:budget=32,query_block=16,window=32,sink=4,refresh=3"},
      {"dhsa", "dhsa:budget=64,query_block=16,chunks_per_block=4,global=8,local=16,dense_tail=8"},
      {"proxy-attn", "proxy-attn:min_budget=16,mass=0.3,block=16"},
      {"pbs-attn", "pbs-attn:block=16,segment=64,mass=0.3"},
      {"seer-attention", "seer-attention:oracle=true,block=16,density=0.3,decode_budget=32"},
      {"psa", "psa:query_block=32,block=16,fold=8"},
      {"blockrank", "blockrank:segment=40"},
  };
  return calls;
}

}  // namespace heed::test
