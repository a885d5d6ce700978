#include "heed/plan/permute.h"

#include <algorithm>
#include <numeric>

#include "heed/base/scratch.h"
#include "heed/base/threads.h"

namespace heed {
namespace {

// Copies the columns of one panel, feature by feature, so that writes run on. Features come in pairs
// in bf16, one by one in f32.
template <class T>
void copy_panel(const PanelLayout& layout, const T* keys, const T* values, std::span<const std::int32_t> order,
                Index first, T* keys_out, T* values_out) {
  constexpr Index pair = sizeof(T) == 2 ? 2 : 1;
  const Index count = std::min(panel_columns, static_cast<Index>(order.size()) - first);
  Index from[panel_columns];
  for (Index c = 0; c < count; ++c) {
    const Index token = order[static_cast<size_t>(first + c)];
    from[c] = token < 0 ? -1 : layout.key_offset(token, 0);
    if (token < 0) continue;
    const T* v = values + layout.value_offset(token, 0);
    T* out = values_out + layout.value_offset(first + c, 0);
    for (Index e = 0; e < layout.dvp; ++e) out[e * pair] = v[e * pair];
  }
  T* out = keys_out + layout.key_offset(first, 0);
  for (Index step = 0; step < layout.dp / pair; ++step)
    for (Index c = 0; c < count; ++c)
      if (from[c] >= 0)
        for (Index i = 0; i < pair; ++i)
          out[(step * panel_columns + c) * pair + i] = keys[from[c] + step * panel_columns * pair + i];
}

// The same for columns that are widened to f32 on the way.
void widen_panel(const KeyValues& kv, Index head, std::span<const std::int32_t> order, Index first,
                 const PanelLayout& to, float* keys_out, float* values_out) {
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  float* key = scratch.take<float>(to.d).data();
  for (Index c = first; c < std::min(first + panel_columns, static_cast<Index>(order.size())); ++c) {
    const Index token = order[static_cast<size_t>(c)];
    if (token < 0) continue;
    kv.read_key(head, token, key);
    for (Index f = 0; f < to.d; ++f) keys_out[to.key_offset(c, f)] = key[f];
    kv.read_value(head, token, values_out + to.value_offset(c, 0));
  }
}

// heads views of `columns` columns; view i shows head head_of(i) of kv in the order order_of(i).
template <class HeadOf, class OrderOf>
void copy_heads(const KeyValues& kv, Index heads, Index columns, HeadOf head_of, OrderOf order_of,
                PermutedSource& out) {
  const PanelLayout layout = kv.layout().of_copies();
  out.keys = Tensor(layout.dtype, {heads, layout.key_elements(columns)});
  out.values = Tensor(layout.dtype, {heads, layout.value_elements(columns)});
  out.source.layout = layout;
  const Index own_positions = out.position.size() > static_cast<size_t>(columns) ? columns : 0;
  const bool own_order = own_positions > 0;
  for (Index i = 0; i < (own_order ? heads : 1); ++i) {
    const auto order = order_of(i);
    out.members.push_back({{order.begin(), order.end()}, {}});
  }
  for (Index i = 0; i < heads; ++i) {
    SourceView& view = out.source.views.emplace_back();
    view.keys = out.keys.view().at({i});
    view.values = out.values.view().at({i});
    view.columns = columns;
    view.position = out.position.data() + i * own_positions;
    view.members = &out.members[static_cast<size_t>(own_order ? i : 0)];
  }
  const Index panels = ceil_div(columns, panel_columns);
  parallel_for(heads * panels, [&](Index unit, int) {
    const Index i = unit / panels, first = unit % panels * panel_columns, head = head_of(i);
    const auto copy = [&]<class T>(T* keys, T* values) {
      copy_panel(layout, static_cast<const T*>(kv.keys(head)), static_cast<const T*>(kv.values(head)), order_of(i),
                 first, keys + i * layout.key_elements(columns), values + i * layout.value_elements(columns));
    };
    if (kv.layout().dtype == DType::bf16) copy(out.keys.as<bf16>(), out.values.as<bf16>());
    else if (kv.layout().dtype == DType::f32) copy(out.keys.as<float>(), out.values.as<float>());
    else
      widen_panel(kv, head, order_of(i), first, layout, out.keys.as<float>() + i * layout.key_elements(columns),
                  out.values.as<float>() + i * layout.value_elements(columns));
  });
}

}  // namespace

std::shared_ptr<const PermutedSource> permute(const KeyValues& kv, std::span<const std::int32_t> order) {
  std::vector<std::int32_t> all(static_cast<size_t>(kv.heads()));
  std::iota(all.begin(), all.end(), 0);
  return permute(kv, order, all);
}

std::shared_ptr<const PermutedSource> permute(const KeyValues& kv, std::span<const std::int32_t> order,
                                              std::span<const std::int32_t> chosen) {
  auto out = std::make_shared<PermutedSource>();
  for (const std::int32_t token : order) out->position.push_back(std::max(token, 0));
  copy_heads(
      kv, static_cast<Index>(chosen.size()), static_cast<Index>(order.size()),
      [&](Index i) { return Index{chosen[static_cast<size_t>(i)]}; }, [&](Index) { return order; }, *out);
  return out;
}

std::shared_ptr<const PermutedSource> permute_each(const KeyValues& kv,
                                                   std::span<const std::vector<std::int32_t>> orders) {
  const Index heads = static_cast<Index>(orders.size()), group = heads / kv.heads();
  auto out = std::make_shared<PermutedSource>();
  for (const auto& order : orders)
    for (const std::int32_t token : order) out->position.push_back(std::max(token, 0));
  copy_heads(
      kv, heads, static_cast<Index>(orders[0].size()), [=](Index i) { return i / group; },
      [&](Index i) { return std::span<const std::int32_t>(orders[static_cast<size_t>(i)]); }, *out);
  out->source.per_query_head = true;
  return out;
}

Index add_permuted(Plan& plan, const KeyValues& kv, std::span<const std::int32_t> order) {
  bool as_is = true;
  for (size_t c = 0; c < order.size(); ++c) {
    const bool beyond = static_cast<Index>(c) >= kv.size();
    as_is = as_is && (beyond ? order[c] == -1 : order[c] == static_cast<std::int32_t>(c));
  }
  if (as_is) return 0;
  const std::shared_ptr<const PermutedSource> permuted = permute(kv, order);
  plan.sources.push_back(permuted->source);
  plan.keep.push_back(permuted);
  return static_cast<Index>(plan.sources.size()) - 1;
}

Index add_keys(Plan& plan, const KeyValues& kv, std::shared_ptr<const KeyValues> keys) {
  Source& source = plan.sources.emplace_back();
  source.layout = kv.layout();
  for (Index head = 0; head < kv.heads(); ++head) {
    SourceView& view = source.views.emplace_back();
    view.keys = keys->keys(head), view.values = kv.values(head);
    view.key_scale = keys->key_scales(head), view.value_scale = kv.value_scales(head);
    view.columns = keys->size();
  }
  plan.keep.push_back(std::move(keys));
  return static_cast<Index>(plan.sources.size()) - 1;
}

std::shared_ptr<const KeyValues> mean_columns(const KeyValues& kv, std::span<const std::int32_t> tokens,
                                              std::span<const Index> begins) {
  const Index heads = kv.heads(), groups = static_cast<Index>(begins.size()) - 1, d = kv.layout().d,
              dv = kv.layout().dv;
  Tensor k(DType::f32, {heads, groups, d}), v(DType::f32, {heads, groups, dv});
  // Some 2048 tokens are a unit of work, however large the groups are.
  const Index tokens_each = std::max<Index>(1, begins.back() / std::max<Index>(1, groups));
  const Index at_once = std::clamp<Index>(2048 / tokens_each, 1, 64), runs = ceil_div(groups, at_once);
  parallel_for(heads * runs, [&](Index unit, int) {
    const Index head = unit / runs, first = unit % runs * at_once;
    for (Index g = first; g < std::min(first + at_once, groups); ++g) {
      float *key = k.as<float>() + (head * groups + g) * d, *value = v.as<float>() + (head * groups + g) * dv;
      const Index begin = begins[static_cast<size_t>(g)], end = begins[static_cast<size_t>(g) + 1];
      for (Index t = begin, next; t < end; t = next) {
        const Index token = tokens[static_cast<size_t>(t)];
        for (next = t + 1; next < end && tokens[static_cast<size_t>(next)] == token + next - t;)
          ++next;  // side by side
        kv.sum_keys(head, token, token + next - t, key);
        kv.sum_values(head, token, token + next - t, value);
      }
      const float n = static_cast<float>(end - begin);
      for (Index i = 0; i < d; ++i) key[i] /= n;
      for (Index e = 0; e < dv; ++e) value[e] /= n;
    }
  });
  auto means = std::make_shared<KeyValues>(heads, d, dv, groups, kv.arithmetic());
  means->append(k.view(), v.view());
  return means;
}

}  // namespace heed
