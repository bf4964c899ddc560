// NEON on 64-bit ARM, where it is always there: 4 floats, 32 registers.
#include "common.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#define FS_NS neon
#define FS_NAME "neon"

namespace fastsparse {
namespace FS_NS {

struct V {
    static constexpr int W = 4, max_spmm = 14, max_sddmm = 14;
    float32x4_t v;
    static V zero() { return {vdupq_n_f32(0.f)}; }
    static V set1(float a) { return {vdupq_n_f32(a)}; }
    static V load(const float* p) { return {vld1q_f32(p)}; }
    template <class I> static V gather(const float* p, const I* i) {
        const float t[4] = {p[i[0]], p[i[1]], p[i[2]], p[i[3]]};
        return {vld1q_f32(t)};
    }
    static V load_first(const float* p, i64 n) {
        float t[4] = {0.f, 0.f, 0.f, 0.f};
        for (i64 i = 0; i < n; ++i) t[i] = p[i];
        return {vld1q_f32(t)};
    }
    // Lanes from..to of what is at p, zero in the others.
    static V load_between(const float* p, i64 from, i64 to) {
        float t[4] = {0.f, 0.f, 0.f, 0.f};
        for (i64 i = from; i < to; ++i) t[i] = p[i];
        return {vld1q_f32(t)};
    }
    static void store_first(float* p, V a, i64 n) {
        float t[4];
        vst1q_f32(t, a.v);
        for (i64 i = 0; i < n; ++i) p[i] = t[i];
    }
    static void store(float* p, V a) { vst1q_f32(p, a.v); }
    static V add(V a, V b) { return {vaddq_f32(a.v, b.v)}; }
    static V mul(V a, V b) { return {vmulq_f32(a.v, b.v)}; }
    static V fma(V a, V b, V c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
    static V gate(V by, V a) { return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a.v), vcleq_f32(by.v, vdupq_n_f32(0.f))))}; }
    static void stream(float* p, V a) { vst1q_f32(p, a.v); }
    static V even(V a, V b) { return {vuzp1q_f32(a.v, b.v)}; }
    static V odd(V a, V b) { return {vuzp2q_f32(a.v, b.v)}; }
    static V zip_low(V a, V b) { return {vzip1q_f32(a.v, b.v)}; }
    static V zip_high(V a, V b) { return {vzip2q_f32(a.v, b.v)}; }
    // best and won become v and place in the lanes where v is larger, or NaN.
    static void keep_larger(V v, V place, V& best, V& won) {
        const uint32x4_t m = vorrq_u32(vcgtq_f32(v.v, best.v), vmvnq_u32(vceqq_f32(v.v, v.v)));
        best.v = vbslq_f32(m, v.v, best.v);
        won.v = vbslq_f32(m, place.v, won.v);
    }
    // The lanes, a bit for each, in which |a| reaches the float of these bits, which order like the numbers, NaN above all.
    static uint32_t reaching(V a, i32 least) {
        const int32x4_t size = vandq_s32(vreinterpretq_s32_f32(a.v), vdupq_n_s32(0x7fffffff));
        const uint32x4_t bit = {1, 2, 4, 8};
        return vaddvq_u32(vandq_u32(vcgeq_s32(size, vdupq_n_s32(least)), bit));
    }
    static void fence() {}
    // The sums of four vectors
    static V quad(V a, V b, V c, V d) { return {vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v))}; }
    static V reduce_quads(const float* b) { return load(b); }
    static void transpose(V* t) {
        const float32x4x2_t a = vtrnq_f32(t[0].v, t[1].v), b = vtrnq_f32(t[2].v, t[3].v);
        t[0].v = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
        t[1].v = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
        t[2].v = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
        t[3].v = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
    }
    static void load_transposed(const float* s, i64 pitch, V* t) {
        for (int i = 0; i < W; ++i) t[i] = load(s + i * pitch);
        transpose(t);
    }
};

#include "micro.h"
}  // namespace FS_NS

const Isa* isa_neon() { return &neon::isa; }
}  // namespace fastsparse
#else
namespace fastsparse { const Isa* isa_neon() { return nullptr; } }
#endif
