// Says whether this CPU has what the library was compiled for. An environment that moved to another machine would
// otherwise end in SIGILL, without a word.

extern "C" const char* busway_missing_cpu_feature() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#define BUSWAY_NEEDS(feature) \
  if (!__builtin_cpu_supports(feature)) return feature;
#ifdef __AVX__
  BUSWAY_NEEDS("avx")
#endif
#ifdef __AVX2__
  BUSWAY_NEEDS("avx2")
#endif
#ifdef __FMA__
  BUSWAY_NEEDS("fma")
#endif
#ifdef __BMI__
  BUSWAY_NEEDS("bmi")
#endif
#ifdef __BMI2__
  BUSWAY_NEEDS("bmi2")
#endif
#ifdef __AVX512F__
  BUSWAY_NEEDS("avx512f")
#endif
#ifdef __AVX512BW__
  BUSWAY_NEEDS("avx512bw")
#endif
#ifdef __AVX512DQ__
  BUSWAY_NEEDS("avx512dq")
#endif
#ifdef __AVX512VL__
  BUSWAY_NEEDS("avx512vl")
#endif
#ifdef __AVX512VBMI__
  BUSWAY_NEEDS("avx512vbmi")
#endif
#ifdef __AVX512VBMI2__
  BUSWAY_NEEDS("avx512vbmi2")
#endif
#endif
  return "";
}
