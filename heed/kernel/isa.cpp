// Which instruction sets this machine can run, and which table is in use.

#include <fmt/format.h>

#include <atomic>
#include <cstdlib>

#include "heed/base/error.h"
#include "heed/kernel/kernels.h"

#if defined(HEED_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace heed {

namespace portable {
extern const Kernels table;
}
#if defined(HEED_X86)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
namespace amx {
extern const Kernels table;
}
#endif

namespace {

struct Isa {
  const Kernels* table;
  bool present;
  bool by_default;  // chosen without being asked for
};

#if defined(HEED_X86)
bool intel() {
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) != 0 && b == signature_INTEL_ebx;
}

// The tile registers must be asked of the kernel once per process.
bool amx_permitted() {
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  const bool tiles = ((d >> 24) & 1u) != 0, tiles_bf16 = ((d >> 22) & 1u) != 0, tiles_int8 = ((d >> 25) & 1u) != 0;
  constexpr long arch_req_xcomp_perm = 0x1023, xtile_data = 18;
  return tiles && tiles_bf16 && tiles_int8 && syscall(SYS_arch_prctl, arch_req_xcomp_perm, xtile_data) == 0;
}
#endif

// Best first. Not chosen by default: kernels whose instruction set no machine at hand has had
// (amx), and the bf16 dot product of Intel's cores, which runs at half the rate of f32 there.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> list;
#if defined(HEED_X86)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    list.push_back({&amx::table, has_bf16 && amx_permitted(), false});
    list.push_back({&avx512_bf16::table, has_bf16, !intel()});
    list.push_back({&avx512::table, has_avx512, true});
    list.push_back({&avx2::table, has_avx2, true});
#endif
    list.push_back({&portable::table, true, true});
    return list;
  }();
  return all;
}

const Kernels& find_isa(const std::string& name, const char* who) {
  for (const Isa& isa : isas())
    if (isa.present && name == isa.table->name) return *isa.table;
  fail_usage("{} = {}, expected one that this machine has: {}", who, name, fmt::join(available_isas(), ", "));
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.present) names.emplace_back(isa.table->name);
  return names;
}

const Kernels& kernels() {
  const Kernels* table = in_use;
  if (table != nullptr) return *table;
  const char* forced = std::getenv("HEED_ISA");
  if (forced != nullptr && *forced != 0) {
    table = &find_isa(forced, "HEED_ISA");
  } else {
    for (const Isa& isa : isas())
      if (isa.present && isa.by_default) {
        table = isa.table;
        break;
      }
  }
  in_use = table;
  return *table;
}

void select_isa(const std::string& name) { in_use = &find_isa(name, "isa"); }

PanelLayout panel_layout(DType stored, Index d, Index dv) {
  const Kernels& k = kernels();
  const bool pairs = stored == DType::bf16;
  return {stored,
          d,
          dv,
          pairs ? round_up(d, k.key_step) : d,
          round_up(dv, Index{16}),
          pairs && k.bf16_dot ? DType::bf16 : DType::f32};
}

PanelLayout widen_panels(const PanelLayout& layout, const void* keys, const void* values, Index panels,
                         float* wide_keys, float* wide_values) {
  const Kernels& k = kernels();
  const Index columns = panels * panel_columns;
  if (layout.dtype == DType::bf16) {
    k.widen_pairs(static_cast<const bf16*>(keys), panels * layout.dp / 2, panel_columns, wide_keys);
    k.widen_pairs(static_cast<const bf16*>(values), columns / 2, layout.dvp, wide_values);
  } else {
    k.widen_bytes(static_cast<const std::int8_t*>(keys), columns * layout.dp, wide_keys);
    k.widen_bytes(static_cast<const std::int8_t*>(values), columns * layout.dvp, wide_values);
  }
  return {DType::f32, layout.d, layout.dv, layout.dp, layout.dvp};
}

void attend_panels(const PanelTask& task) {
  const Kernels& k = kernels();
  switch (task.layout.dtype) {
    case DType::bf16: return task.layout.product == DType::bf16 ? k.attend_bf16(task) : k.attend_wide_bf16(task);
    case DType::i8: return k.attend_wide_i8(task);
    default: return k.attend_f32(task);
  }
}

void multiply_keys(const PackedKeys& keys, Index first, Index columns, const void* q, Index rows, float* products,
                   Index ldc) {
  const Kernels& k = kernels();
  const PanelLayout& layout = keys.layout;
  const Index dp = layout.dp, offset = first * dp;
  const auto* wide = static_cast<const float*>(q);
  switch (layout.dtype) {
    case DType::bf16: {
      const bf16* panels = static_cast<const bf16*>(keys.panels) + offset;
      if (layout.product == DType::bf16)
        k.gemm_bf16(rows, columns, dp, static_cast<const bf16*>(q), dp, panels, products, ldc, false);
      else k.gemm_wide_bf16(rows, columns, dp, wide, dp, panels, products, ldc, false);
      return;
    }
    case DType::i8:
      k.gemm_wide_i8(rows, columns, dp, wide, dp, static_cast<const std::int8_t*>(keys.panels) + offset, products, ldc,
                     false);
      for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < columns; ++j) products[i * ldc + j] *= keys.scale[first + j];
      return;
    default:
      k.gemm_f32(rows, columns, dp, wide, dp, static_cast<const float*>(keys.panels) + offset, products, ldc, false);
  }
}

}  // namespace heed
