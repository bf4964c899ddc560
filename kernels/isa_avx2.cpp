// AVX2 with FMA: 8 floats, 16 registers.
#include "common.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FS_NS avx2
#define FS_NAME "avx2"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace fastsparse {
namespace FS_NS {

struct V {
    static constexpr int W = 8, max_spmm = 14, max_sddmm = 8;
    __m256 v;
    static V zero() { return {_mm256_setzero_ps()}; }
    static V set1(float a) { return {_mm256_set1_ps(a)}; }
    static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static V gather(const float* p, const i32* i) { return {_mm256_i32gather_ps(p, _mm256_loadu_si256((const __m256i*)i), 4)}; }
    // Unsigned: counted from the middle of what 32 bits reach.
    static V gather(const float* p, const uint32_t* i) {
        const __m256i at = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)i), _mm256_set1_epi32(i32(0x80000000)));
        return {_mm256_i32gather_ps((const float*)((const char*)p + (i64(4) << 31)), at, 4)};
    }
    static __m256i first(i64 n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
    static V load_first(const float* p, i64 n) { return {_mm256_maskload_ps(p, first(n))}; }
    // Lanes from..to of what is at p, zero in the others.
    static V load_between(const float* p, i64 from, i64 to) { return {_mm256_maskload_ps(p, _mm256_andnot_si256(first(from), first(to)))}; }
    static void store_first(float* p, V a, i64 n) { _mm256_maskstore_ps(p, first(n), a.v); }
    static void store(float* p, V a) { _mm256_storeu_ps(p, a.v); }
    static V add(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
    static V mul(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static V gate(V by, V a) { return {_mm256_and_ps(_mm256_cmp_ps(by.v, _mm256_setzero_ps(), _CMP_NLE_UQ), a.v)}; }
    static void stream(float* p, V a) { _mm256_stream_ps(p, a.v); }
    static V even(V a, V b) {
        const __m256d s = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));
        return {_mm256_castpd_ps(_mm256_permute4x64_pd(s, 0xd8))};
    }
    static V odd(V a, V b) {
        const __m256d s = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0xdd));
        return {_mm256_castpd_ps(_mm256_permute4x64_pd(s, 0xd8))};
    }
    static V zip_low(V a, V b) { return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x20)}; }
    static V zip_high(V a, V b) { return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x31)}; }
    // best and won become v and place in the lanes where v is larger, or NaN.
    static void keep_larger(V v, V place, V& best, V& won) {
        const __m256 m = _mm256_or_ps(_mm256_cmp_ps(v.v, best.v, _CMP_GT_OQ), _mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q));
        best.v = _mm256_blendv_ps(best.v, v.v, m);
        won.v = _mm256_blendv_ps(won.v, place.v, m);
    }
    // The lanes, a bit for each, in which |a| reaches the float of these bits, which order like the numbers, NaN above all.
    static uint32_t reaching(V a, i32 least) {
        const __m256i size = _mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x7fffffff));
        return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(size, _mm256_set1_epi32(least - 1)))));
    }
    static void fence() { _mm_sfence(); }
    static __m256 pair(__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
    // Four numbers in each 128 bits, one for each vector; then 2 such, with what is left to add a 128 bits apart.
    static V quad(V a, V b, V c, V d) {
        const __m256d p = _mm256_castps_pd(pair(a.v, b.v)), q = _mm256_castps_pd(pair(c.v, d.v));
        return {_mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(p, q)), _mm256_castpd_ps(_mm256_unpackhi_pd(p, q)))};
    }
    static V reduce_quads(const float* b) {
        const __m256 p = _mm256_load_ps(b), q = _mm256_load_ps(b + 8);
        return {_mm256_add_ps(_mm256_permute2f128_ps(p, q, 0x21), _mm256_blend_ps(p, q, 0xf0))};
    }
    static void transpose(V* t) {
        __m256 a[8], b[8];
        for (int i = 0; i < 4; ++i) {
            a[2 * i] = _mm256_unpacklo_ps(t[2 * i].v, t[2 * i + 1].v);
            a[2 * i + 1] = _mm256_unpackhi_ps(t[2 * i].v, t[2 * i + 1].v);
        }
        for (int h = 0; h < 8; h += 4)
            for (int i = 0; i < 2; ++i) {
                b[h + 2 * i] = _mm256_shuffle_ps(a[h + i], a[h + i + 2], 0x44);
                b[h + 2 * i + 1] = _mm256_shuffle_ps(a[h + i], a[h + i + 2], 0xee);
            }
        for (int i = 0; i < 4; ++i) {
            t[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
            t[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
        }
    }
    // 4 floats of rows 0 and 4: loads that insert cost no shuffle
    static __m256 half(const float* s, i64 pitch) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(s)), _mm_loadu_ps(s + 4 * pitch), 1);
    }
    // t[j] is column j of the 8 x 8 floats at s
    static void load_transposed(const float* s, i64 pitch, V* t) {
#pragma GCC unroll 2
        for (int j = 0; j < 8; j += 4) {
            const __m256 r0 = half(s + j, pitch), r1 = half(s + j + pitch, pitch);
            const __m256 r2 = half(s + j + 2 * pitch, pitch), r3 = half(s + j + 3 * pitch, pitch);
            const __m256 a = _mm256_unpacklo_ps(r0, r1), b = _mm256_unpackhi_ps(r0, r1);
            const __m256 c = _mm256_unpacklo_ps(r2, r3), d = _mm256_unpackhi_ps(r2, r3);
            t[j].v = _mm256_shuffle_ps(a, c, 0x44);
            t[j + 1].v = _mm256_shuffle_ps(a, c, 0xee);
            t[j + 2].v = _mm256_shuffle_ps(b, d, 0x44);
            t[j + 3].v = _mm256_shuffle_ps(b, d, 0xee);
        }
    }
};

#include "micro.h"
}  // namespace FS_NS
}  // namespace fastsparse

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastsparse {
const Isa* isa_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2::isa : nullptr; }
}
#else
namespace fastsparse { const Isa* isa_avx2() { return nullptr; } }
#endif
