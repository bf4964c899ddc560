// Scratch memory is kept in a small pool: fresh pages would cost more than the kernels that write to them.
#include "common.h"
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <climits>
#include <malloc.h>
#endif

namespace fastsparse {
namespace {

constexpr size_t huge = size_t(2) << 20, keep = size_t(1) << 30;
struct Block { void* p; size_t bytes; };
struct Pool { std::mutex lock; std::vector<Block> free; size_t held = 0; };
Pool& pool() { static Pool* p = new Pool; return *p; }  // never destroyed: threads may outlive main

void* fresh(size_t bytes) {
#ifdef _WIN32
    void* p = _aligned_malloc(bytes, 64);
#else
    void* p = nullptr;
    if (posix_memalign(&p, bytes >= huge ? huge : 64, bytes)) p = nullptr;
#endif
    if (!p) throw std::bad_alloc();
#ifdef __linux__
    if (bytes >= huge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
}

void release(void* p) {
#ifdef _WIN32
    _aligned_free(p);
#else
    std::free(p);
#endif
}

}  // namespace

Scratch::Scratch(i64 floats) : p_(nullptr), bytes_(0) {
    take(floats);
#ifdef FASTSPARSE_POISON  // tests: whatever is read before it was written shows
    for (i64 i = 0; i < floats; ++i) p_[i] = std::numeric_limits<float>::quiet_NaN();
#endif
}

void Scratch::take(i64 floats) {
    if (floats < 0 || floats > (i64(1) << 60)) throw std::bad_alloc();
    const size_t want = (size_t(floats) * sizeof(float) + 4095) / 4096 * 4096 + 4096;
    Pool& pl = pool();
    {
        std::lock_guard<std::mutex> g(pl.lock);
        auto best = pl.free.end();
        for (auto b = pl.free.begin(); b != pl.free.end(); ++b)
            if (b->bytes >= want && b->bytes <= 4 * want + huge && (best == pl.free.end() || b->bytes < best->bytes)) best = b;
        if (best != pl.free.end()) {
            p_ = static_cast<float*>(best->p); bytes_ = best->bytes;
            pl.held -= bytes_;
            pl.free.erase(best);
            return;
        }
    }
    bytes_ = want >= huge / 4 ? (want + huge - 1) / huge * huge : want;
    p_ = static_cast<float*>(fresh(bytes_));
}

Scratch::~Scratch() {
    Pool& pl = pool();
    std::lock_guard<std::mutex> g(pl.lock);
    if (bytes_ > keep) { release(p_); return; }
    while (!pl.free.empty() && (pl.held + bytes_ > keep || pl.free.size() >= 32)) {  // the oldest goes first
        pl.held -= pl.free.front().bytes;
        release(pl.free.front().p);
        pl.free.erase(pl.free.begin());
    }
    pl.free.push_back({p_, bytes_});
    pl.held += bytes_;
}

// By default glibc returns the memory of large tensors to the system when they are freed, and clears new pages at the next
// call: that takes longer than a sparse layer. Whoever has set its variables knows better.
bool keep_freed_memory(bool on) {
#ifdef __GLIBC__
    if (std::getenv("MALLOC_MMAP_MAX_") || std::getenv("MALLOC_TRIM_THRESHOLD_") || std::getenv("GLIBC_TUNABLES")) return false;
    constexpr int limit = 32 << 20;  // where glibc's own adaptive thresholds end
    mallopt(M_MMAP_THRESHOLD, limit);
    mallopt(M_MMAP_MAX, on ? 0 : 65536);
    mallopt(M_TRIM_THRESHOLD, on ? INT_MAX : 2 * limit);
    if (!on) malloc_trim(0);
    return true;
#else
    (void)on;
    return false;
#endif
}

}  // namespace fastsparse
