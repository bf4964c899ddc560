// The reference: plain C++ on four floats at a time, for any machine.
#include "common.h"
#define FS_NS scalar
#define FS_NAME "scalar"

namespace fastsparse {
namespace FS_NS {

struct V {
    static constexpr int W = 4, max_spmm = 4, max_sddmm = 4;
    float f[4];
    static V zero() { return {{0, 0, 0, 0}}; }
    static V set1(float a) { return {{a, a, a, a}}; }
    static V load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
    template <class I> static V gather(const float* p, const I* i) { return {{p[i[0]], p[i[1]], p[i[2]], p[i[3]]}}; }
    static V load_first(const float* p, i64 n) {
        V a = zero();
        for (i64 i = 0; i < n; ++i) a.f[i] = p[i];
        return a;
    }
    // Lanes from..to of what is at p, zero in the others.
    static V load_between(const float* p, i64 from, i64 to) {
        V a = zero();
        for (i64 i = from; i < to; ++i) a.f[i] = p[i];
        return a;
    }
    static void store_first(float* p, V a, i64 n) { for (i64 i = 0; i < n; ++i) p[i] = a.f[i]; }
    static void store(float* p, V a) { for (int i = 0; i < 4; ++i) p[i] = a.f[i]; }
    static V add(V a, V b) { for (int i = 0; i < 4; ++i) a.f[i] += b.f[i]; return a; }
    static V mul(V a, V b) { for (int i = 0; i < 4; ++i) a.f[i] *= b.f[i]; return a; }
    static V fma(V a, V b, V c) { for (int i = 0; i < 4; ++i) c.f[i] += a.f[i] * b.f[i]; return c; }
    static V gate(V by, V a) { for (int i = 0; i < 4; ++i) if (by.f[i] <= 0) a.f[i] = 0; return a; }
    static void stream(float* p, V a) { store(p, a); }
    static V even(V a, V b) { return {{a.f[0], a.f[2], b.f[0], b.f[2]}}; }
    static V odd(V a, V b) { return {{a.f[1], a.f[3], b.f[1], b.f[3]}}; }
    static V zip_low(V a, V b) { return {{a.f[0], b.f[0], a.f[1], b.f[1]}}; }
    static V zip_high(V a, V b) { return {{a.f[2], b.f[2], a.f[3], b.f[3]}}; }
    // best and won become v and place in the lanes where v is larger, or NaN.
    static void keep_larger(V v, V place, V& best, V& won) {
        for (int i = 0; i < 4; ++i)
            if (v.f[i] > best.f[i] || v.f[i] != v.f[i]) { best.f[i] = v.f[i]; won.f[i] = place.f[i]; }
    }
    // The lanes, a bit for each, in which |a| reaches the float of these bits, which order like the numbers, NaN above all.
    static uint32_t reaching(V a, i32 least) {
        i32 bits[W];
        std::memcpy(bits, a.f, sizeof bits);
        uint32_t lanes = 0;
        for (int i = 0; i < W; ++i) lanes |= uint32_t((bits[i] & 0x7fffffff) >= least) << i;
        return lanes;
    }
    static void fence() {}
    // The sums of four vectors
    static V quad(V a, V b, V c, V d) {
        const auto sum = [](const V& v) { return (v.f[0] + v.f[2]) + (v.f[1] + v.f[3]); };
        return {{sum(a), sum(b), sum(c), sum(d)}};
    }
    static V reduce_quads(const float* b) { return load(b); }
    static void transpose(V* t) {
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < i; ++j) { const float a = t[i].f[j]; t[i].f[j] = t[j].f[i]; t[j].f[i] = a; }
    }
    static void load_transposed(const float* s, i64 pitch, V* t) {
        for (int i = 0; i < W; ++i) t[i] = load(s + i * pitch);
        transpose(t);
    }
};

#include "micro.h"
}  // namespace FS_NS

const Isa* isa_scalar() { return &scalar::isa; }
}  // namespace fastsparse
