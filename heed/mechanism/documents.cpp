#include "heed/mechanism/documents.h"

#include <algorithm>
#include <memory>
#include <set>

namespace heed::mechanism {

std::span<const Document> Documents::meeting(Index b, Index begin, Index end) const {
  const std::vector<Document>& all = of[static_cast<size_t>(b)];
  const auto first = std::partition_point(all.begin(), all.end(), [&](const Document& d) { return d.end <= begin; });
  const auto last = std::partition_point(first, all.end(), [&](const Document& d) { return d.begin < end; });
  return {first, last};
}

ExtraSpec document_spec() {
  return {"doc",
          {DType::i32},
          {"B", "M"},
          false,
          "document number of every token; tokens of different documents never meet"};
}

ExtraSpec key_mask_spec() { return {"key_mask", {DType::u8}, {"B", "M"}, false, "0 hides a key (padding)"}; }

Documents read_documents(const Inputs& in) {
  const Problem& p = in.problem;
  Documents documents;
  const TensorView* doc = in.find("doc");
  if (doc == nullptr) {
    documents.of.assign(static_cast<size_t>(p.B), {{0, p.M}});
    return documents;
  }
  if (p.N > p.M)
    fail("doc: {} queries and {} keys, expected at most as many queries as documents have tokens", p.N, p.M);
  for (Index b = 0; b < p.B; ++b) {
    const auto number = [&](Index j) { return *static_cast<const std::int32_t*>(doc->at({b, j})); };
    std::vector<Document> list;
    std::set<std::int32_t> seen;
    for (Index begin = 0, end; begin < p.M; begin = end) {
      for (end = begin + 1; end < p.M && number(end) == number(begin);) ++end;
      if (!seen.insert(number(begin)).second)
        fail("doc = {} at token {}, expected each document's tokens to stand together", number(begin), begin);
      list.push_back({begin, end});
    }
    documents.of.push_back(std::move(list));
  }
  return documents;
}

Documents apply_documents(const Inputs& in, Plan& plan) {
  Documents documents = read_documents(in);
  if (in.find("doc") == nullptr) return documents;
  const Index keys = in.problem.M;
  plan.visible_first.resize(static_cast<size_t>(in.problem.B * keys));
  plan.visible_end.resize(static_cast<size_t>(in.problem.B * keys));
  for (Index b = 0; b < in.problem.B; ++b)
    for (const Document& document : documents.of[static_cast<size_t>(b)])
      for (Index j = document.begin; j < document.end; ++j) {
        plan.visible_first[static_cast<size_t>(b * keys + j)] = static_cast<std::int32_t>(document.begin);
        plan.visible_end[static_cast<size_t>(b * keys + j)] = static_cast<std::int32_t>(document.end);
      }
  return documents;
}

void apply_key_mask(const Inputs& in, Plan& plan) {
  const TensorView* mask = in.find("key_mask");
  if (mask == nullptr) return;
  const Problem& p = in.problem;
  const Index words = ceil_div(p.M, 64);
  auto bits = std::make_shared<std::vector<std::uint64_t>>(static_cast<size_t>(p.B * words), 0);
  for (Index b = 0; b < p.B; ++b)
    for (Index j = 0; j < p.M; ++j)
      if (*static_cast<const std::uint8_t*>(mask->at({b, j})) != 0)
        (*bits)[static_cast<size_t>(b * words + j / 64)] |= std::uint64_t{1} << (j % 64);
  Source& source = plan.sources[0];
  for (size_t view = 0; view < source.views.size(); ++view)
    source.views[view].visible = bits->data() + static_cast<Index>(view) / p.Hk * words;
  plan.keep.push_back(bits);
}

}  // namespace heed::mechanism
