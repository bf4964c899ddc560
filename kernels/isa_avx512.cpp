// AVX-512: 16 floats, 32 registers.
#include "common.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // the intrinsics' own headers trigger both
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define FS_NS avx512
#define FS_NAME "avx512"
#define FS_MASKS
#define FS_HALVES

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
#endif

namespace fastsparse {
namespace FS_NS {

struct V {
    static constexpr int W = 16, max_spmm = 14, max_sddmm = 14;
    __m512 v;
    static V zero() { return {_mm512_setzero_ps()}; }
    static V set1(float a) { return {_mm512_set1_ps(a)}; }
    static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static V gather(const float* p, const i32* i) { return {_mm512_i32gather_ps(_mm512_loadu_si512(i), p, 4)}; }
    static __mmask16 first(i64 n) { return __mmask16((1u << n) - 1); }
    // Unsigned: counted from the middle of what 32 bits reach.
    static V gather(const float* p, const uint32_t* i) {
        const __m512i at = _mm512_xor_si512(_mm512_loadu_si512(i), _mm512_set1_epi32(i32(0x80000000)));
        return {_mm512_i32gather_ps(at, (const char*)p + (i64(4) << 31), 4)};
    }
    static V load_first(const float* p, i64 n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
    // Lanes from..to of what is at p, zero in the others.
    static V load_between(const float* p, i64 from, i64 to) { return {_mm512_maskz_loadu_ps(__mmask16(first(to) & ~first(from)), p)}; }
    static void store_first(float* p, V a, i64 n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
    static void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
    static void keep(V& a) { asm("" : "+v"(a.v)); }   // in a register: lest it be loaded again for each use
    static V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
    static V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static V gate(V by, V a) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(by.v, _mm512_setzero_ps(), _CMP_NLE_UQ), a.v)}; }
    static void stream(float* p, V a) { _mm512_stream_ps(p, a.v); }
    // Lanes of a (0 to 15) and b (16 to 31) in any order
    static V pick(V a, V b, __m512i lanes) { return {_mm512_permutex2var_ps(a.v, lanes, b.v)}; }
    // Lanes n.. of a, then b
    static V from(V a, V b, i32 n) {
        return pick(a, b, _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(n)));
    }
    static V even(V a, V b) { return pick(a, b, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)); }
    static V odd(V a, V b) { return pick(a, b, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)); }
    static V zip_low(V a, V b) { return pick(a, b, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)); }
    static V zip_high(V a, V b) { return pick(a, b, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)); }
    static V load_lanes(const float* p, uint16_t lanes) { return {_mm512_maskz_loadu_ps(lanes, p)}; }
    static V expand(const float* p, uint16_t lanes) { return {_mm512_maskz_expandloadu_ps(lanes, p)}; }
    static void store_lanes(float* p, V a, uint16_t lanes) { _mm512_mask_storeu_ps(p, lanes, a.v); }
    static V last(V a, const float* p, i64 n) { return {_mm512_mask_loadu_ps(a.v, __mmask16(~first(W - n)), p)}; }
    // best and won become v and place in the lanes where v is larger, or NaN.
    static void keep_larger(V v, V place, V& best, V& won) {
        const __mmask16 m = _mm512_cmp_ps_mask(v.v, best.v, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
        best.v = _mm512_mask_mov_ps(best.v, m, v.v);
        won.v = _mm512_mask_mov_ps(won.v, m, place.v);
    }
    // The lanes, a bit for each, in which |a| reaches the float of these bits, which order like the numbers, NaN above all.
    static uint32_t reaching(V a, i32 least) {
        return _mm512_cmpge_epi32_mask(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(least));
    }
    // The same of 32 halves of floats.
    static uint32_t reaching(const bf16* p, i32 least) {
        return _mm512_cmpge_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff)), _mm512_set1_epi16(short(least)));
    }
    static void fence() { _mm_sfence(); }
    static __m512 pair(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
    // Four numbers in each 128 bits, one for each vector; then 4 such, with what is left to add a 128 bits apart.
    static V quad(V a, V b, V c, V d) {
        const __m512d p = _mm512_castps_pd(pair(a.v, b.v)), q = _mm512_castps_pd(pair(c.v, d.v));
        return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)))};
    }
    static __m512 halves(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    static V reduce_quads(const float* b) {
        return {halves(halves(_mm512_load_ps(b), _mm512_load_ps(b + 16)), halves(_mm512_load_ps(b + 32), _mm512_load_ps(b + 48)))};
    }
    static void transpose(V* t) {
        __m512 a[16], b[16];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            a[2 * i] = _mm512_unpacklo_ps(t[2 * i].v, t[2 * i + 1].v);
            a[2 * i + 1] = _mm512_unpackhi_ps(t[2 * i].v, t[2 * i + 1].v);
        }
#pragma GCC unroll 4
        for (int h = 0; h < 16; h += 4)
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                b[h + 2 * i] = _mm512_shuffle_ps(a[h + i], a[h + i + 2], 0x44);
                b[h + 2 * i + 1] = _mm512_shuffle_ps(a[h + i], a[h + i + 2], 0xee);
            }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
            a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
            a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
            a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            t[i].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
            t[i + 8].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
            t[i + 4].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88);
            t[i + 12].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
        }
    }
    // 4 floats of rows 0, 4, 8 and 12: loads that insert cost no shuffle
    static __m512 quarter(const float* s, i64 pitch) {
        __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(s));
        v = _mm512_insertf32x4(v, _mm_loadu_ps(s + 4 * pitch), 1);
        v = _mm512_insertf32x4(v, _mm_loadu_ps(s + 8 * pitch), 2);
        return _mm512_insertf32x4(v, _mm_loadu_ps(s + 12 * pitch), 3);
    }
    // t[j] is column j of the 16 x 16 floats at s
    static void load_transposed(const float* s, i64 pitch, V* t) {
#pragma GCC unroll 4
        for (int j = 0; j < 16; j += 4) {
            const __m512 r0 = quarter(s + j, pitch), r1 = quarter(s + j + pitch, pitch);
            const __m512 r2 = quarter(s + j + 2 * pitch, pitch), r3 = quarter(s + j + 3 * pitch, pitch);
            const __m512 a = _mm512_unpacklo_ps(r0, r1), b = _mm512_unpackhi_ps(r0, r1);
            const __m512 c = _mm512_unpacklo_ps(r2, r3), d = _mm512_unpackhi_ps(r2, r3);
            t[j].v = _mm512_shuffle_ps(a, c, 0x44);
            t[j + 1].v = _mm512_shuffle_ps(a, c, 0xee);
            t[j + 2].v = _mm512_shuffle_ps(b, d, 0x44);
            t[j + 3].v = _mm512_shuffle_ps(b, d, 0xee);
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
const Isa* isa_avx512() {
    const bool ok = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    return ok ? &avx512::isa : nullptr;
}
}
#else
namespace fastsparse { const Isa* isa_avx512() { return nullptr; } }
#endif
