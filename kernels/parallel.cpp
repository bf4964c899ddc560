// Threads come from the OpenMP runtime that the process has already loaded (PyTorch brings one): a second pool
// would fight with the first for the cores. Nothing is linked; the runtime is looked up when it is first needed.
#include "common.h"
#include <algorithm>
#include <atomic>
#include <exception>
#ifdef FASTSPARSE_STD_THREADS
#include <thread>
#endif
#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#ifdef __linux__
#include <link.h>
#endif
#ifdef __APPLE__
#include <mach-o/dyld.h>
#endif

namespace fastsparse {
namespace {

struct Job {
    TaskFn body; void* ctx; i64 n;
    std::atomic<i64> next{0}; std::atomic<int> slots{0};
    std::mutex lock; std::exception_ptr error;   // what a task throws must not leave the OpenMP region
};

void work(void* p) {
    Job& j = *static_cast<Job*>(p);
    const int slot = j.slots++;
    try {
        for (i64 t; (t = j.next++) < j.n;) j.body(j.ctx, t, slot);
    } catch (...) {
        std::lock_guard<std::mutex> guard(j.lock);
        j.error = std::current_exception();
        j.next = j.n;
    }
}

#ifndef FASTSPARSE_STD_THREADS
void work_kmp(i32*, i32*, void* p) { work(p); }

struct Runtime {
    std::string path;
    int (*max_threads)() = nullptr;
    void (*gomp)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    void (*kmp_fork)(void*, i32, void (*)(i32*, i32*, void*), ...) = nullptr;
    void (*kmp_push)(void*, i32, i32) = nullptr;
    i32 (*kmp_gtid)(void*) = nullptr;
    bool ok() const { return max_threads && (gomp || (kmp_fork && kmp_push && kmp_gtid)); }
};

bool is_openmp(const char* path) {
    if (!path) return false;
    const char* slash = std::strrchr(path, '/');
    const char* base = slash ? slash + 1 : path;
    for (const char* name : {"libgomp", "libomp", "libiomp5"})
        if (!std::strncmp(base, name, std::strlen(name))) return true;
    return false;
}

#if defined(__linux__) || defined(__APPLE__)
template <class F> void symbol(void* lib, const char* name, F& f) { f = reinterpret_cast<F>(dlsym(lib, name)); }

Runtime open_runtime(const std::string& path) {
    Runtime r;
    void* lib = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    if (!lib) return r;
    r.path = path;
    symbol(lib, "omp_get_max_threads", r.max_threads);
    symbol(lib, "GOMP_parallel", r.gomp);
    symbol(lib, "__kmpc_fork_call", r.kmp_fork);
    symbol(lib, "__kmpc_push_num_threads", r.kmp_push);
    symbol(lib, "__kmpc_global_thread_num", r.kmp_gtid);
    return r;
}
#endif

std::vector<std::string> loaded_runtimes() {
    std::vector<std::string> paths;
#ifdef __linux__
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void* out) {
        if (is_openmp(info->dlpi_name)) static_cast<std::vector<std::string>*>(out)->push_back(info->dlpi_name);
        return 0;
    }, &paths);
#elif defined(__APPLE__)
    for (uint32_t i = 0; i < _dyld_image_count(); ++i)
        if (is_openmp(_dyld_get_image_name(i))) paths.push_back(_dyld_get_image_name(i));
#endif
    // PyTorch's own copy first, if another package brought a second one.
    std::stable_partition(paths.begin(), paths.end(), [](const std::string& p) { return p.find("torch") != std::string::npos; });
    return paths;
}

const Runtime* runtime() {
    static std::atomic<const Runtime*> found{nullptr};
    if (const Runtime* r = found) return r;
#if defined(__linux__) || defined(__APPLE__)
    for (const std::string& path : loaded_runtimes()) {
        const Runtime r = open_runtime(path);
        if (r.ok()) { found = new Runtime(r); break; }  // kept for good, like the library itself
    }
#endif
    return found;
}
#endif

void run(Job& job, int threads) {
#ifdef FASTSPARSE_STD_THREADS
    std::vector<std::thread> team;
    for (int i = 1; i < threads; ++i) team.emplace_back(work, &job);
    work(&job);
    for (auto& t : team) t.join();
#else
    const Runtime* r = runtime();
    if (!r) work(&job);
    else if (r->gomp) r->gomp(work, &job, unsigned(threads), 0);
    else {
        static char source[] = ";fastsparse;parallel;0;0;;";
        struct { i32 reserved, flags, r2, r3; char* source; } where = {0, 2, 0, 0, source};
        r->kmp_push(&where, r->kmp_gtid(&where), threads);
        r->kmp_fork(&where, 1, work_kmp, static_cast<void*>(&job));
    }
#endif
}

}  // namespace

int max_threads() {
#ifdef FASTSPARSE_STD_THREADS
    return int(std::max(1u, std::thread::hardware_concurrency()));
#else
    const Runtime* r = runtime();
    return r ? std::max(1, r->max_threads()) : 1;
#endif
}

std::string threading() {
#ifdef FASTSPARSE_STD_THREADS
    return "std::thread";
#else
    const Runtime* r = runtime();
    return r ? "openmp: " + r->path : "serial: no OpenMP runtime is loaded (import torch first)";
#endif
}

void run_tasks(i64 n, int threads, TaskFn body, void* ctx) {
    if (threads <= 1 || n <= 1) {
        for (i64 t = 0; t < n; ++t) body(ctx, t, 0);
        return;
    }
    Job job;
    job.body = body; job.ctx = ctx; job.n = n;
    run(job, int(std::min<i64>(threads, n)));
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace fastsparse
