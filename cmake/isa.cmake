# Kernels are optimised in every kind of build. g++'s own vector headers trip its uninitialized-value warnings.
set(HEED_KERNEL_FLAGS -O3)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND HEED_KERNEL_FLAGS -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

# heed/kernel/isa/NAME.cpp is compiled once, with that instruction set's flags; which one runs is
# decided at start-up (heed/kernel/kernels.h).
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(HEED_AVX2_FLAGS -mavx2 -mfma -mf16c -mbmi2)
  set(HEED_AVX512_FLAGS ${HEED_AVX2_FLAGS} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  set(HEED_AVX512_BF16_FLAGS ${HEED_AVX512_FLAGS} -mavx512vnni -mavx512bf16)
  set(HEED_AMX_FLAGS ${HEED_AVX512_BF16_FLAGS} -mamx-tile -mamx-bf16)
  foreach(isa avx2 avx512 avx512_bf16 amx)
    string(TOUPPER ${isa} upper)
    target_sources(heed PRIVATE heed/kernel/isa/${isa}.cpp)
    set_source_files_properties(heed/kernel/isa/${isa}.cpp PROPERTIES COMPILE_OPTIONS "${HEED_KERNEL_FLAGS};${HEED_${upper}_FLAGS}")
  endforeach()
  target_compile_definitions(heed PRIVATE HEED_X86=1)
endif()
target_sources(heed PRIVATE heed/kernel/isa/portable.cpp)
set_source_files_properties(heed/kernel/isa/portable.cpp PROPERTIES COMPILE_OPTIONS "${HEED_KERNEL_FLAGS}")
