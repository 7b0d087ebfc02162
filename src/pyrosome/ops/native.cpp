#include "native.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <pthread.h>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

const E4M3 e4m3;

static std::atomic<int64_t> grain{1 << 18};

int worth(int64_t operations, int threads) {
    const int64_t most = 1 + operations / grain.load(std::memory_order_relaxed);
    return static_cast<int>(most < threads ? most : threads);
}

// Operations that are worth a thread (tests make it small, to have many).
EXPORT void pyrosome_set_grain(int64_t operations) { grain = operations > 0 ? operations : 1 << 18; }

// What dot2 is held to.  Returns 1 where this processor gives those bits: a check made once, when the library is opened.
EXPORT int pyrosome_check() {
    uint32_t state = 12345;
    const auto random = [&] { return state = state * 1664525u + 1013904223u; };
    const auto value = [&] {  // a bfloat16 between 2^-8 and 2^8
        return (random() >> 31) << 15 | (119 + (random() >> 20) % 16) << 7 | (random() >> 20 & 127);
    };
    for (int round = 0; round < 256; ++round) {
        uint32_t a[16], b[16];
        float c[16], got[16];
        for (int i = 0; i < 16; ++i) {
            a[i] = value() << 16 | value(), b[i] = value() << 16 | value();
            c[i] = std::ldexp(static_cast<float>(static_cast<int32_t>(random())), -30 + static_cast<int>(random() >> 28));
        }
        store(got, dot2(load(c), iload(a), iload(b)));
        for (int i = 0; i < 16; ++i) {
            const float first = bf16_value(a[i] >> 16) * bf16_value(b[i] >> 16);  // exact
            const float second = bf16_value(a[i] & 0xFFFF) * bf16_value(b[i] & 0xFFFF);
            const volatile float once = c[i] + first;
            const volatile float want = once + second;
            if (got[i] != want) return 0;
        }
    }
    return 1;
}

EXPORT int pyrosome_level() { return PYROSOME_LEVEL; }

// Asks for huge pages under a region: fewer misses of address translation while weights stream.  Advice only.
EXPORT void pyrosome_huge_pages(void* begin, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t huge = 2 << 20, first = (reinterpret_cast<uintptr_t>(begin) + huge - 1) / huge * huge;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + size) / huge * huge;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)size;
#endif
}

namespace {

// A thread's scratch: chunks that are never moved while in use, each larger than the one before.
struct Arena {
    std::vector<std::pair<std::unique_ptr<char[]>, size_t>> chunks;
    size_t chunk = 0, used = 0;
};
thread_local Arena arena;

}  // namespace

Scratch::Scratch() : chunk_(arena.chunk), used_(arena.used) {}
Scratch::~Scratch() {
    arena.chunk = chunk_;
    arena.used = used_;
}

void* Scratch::bytes(int64_t size) {
    const size_t need = (static_cast<size_t>(size) + 63) / 64 * 64;
    for (;; ++arena.chunk, arena.used = 0) {
        if (arena.chunk == arena.chunks.size()) {
            const size_t room = std::max<size_t>(need + 64, arena.chunk ? 2 * arena.chunks.back().second : 1 << 20);
            arena.chunks.emplace_back(std::unique_ptr<char[]>(new char[room]), room);
        }
        auto& [memory, room] = arena.chunks[arena.chunk];
        const uintptr_t base = (reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64;
        if (base - reinterpret_cast<uintptr_t>(memory.get()) + arena.used + need <= room) {
            void* at = reinterpret_cast<void*>(base + arena.used);
            arena.used += need;
            return at;
        }
    }
}

namespace {

// Workers sleep between jobs: a spinning pool collapses when another process shares its cores.  A job ends when its parts
// are done, not when every worker has looked in: one that wakes late, for want of a core, holds nobody up.
class Pool {
  public:
    static Pool& get() {
        static std::once_flag made;
        std::call_once(made, [] {
            current_ = new Pool;  // never destroyed: workers may outlive static destruction
            // A forked child has no workers: it starts with a pool of its own.
            pthread_atfork(nullptr, nullptr, [] { current_ = new Pool; });
        });
        return *current_;
    }

    void run(int64_t parts, int threads, const std::function<void(int64_t)>& part) {
        std::unique_lock<std::mutex> one_job(job_mutex_, std::defer_lock);
        // A second caller at the same time works alone, and so does a part that has parts.
        if (threads <= 1 || parts <= 1 || !one_job.try_lock()) {
            for (int64_t i = 0; i < parts; ++i) part(i);
            return;
        }
        const int helpers = static_cast<int>(std::min<int64_t>(threads, parts)) - 1;
        grow(helpers);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            wanted_ = helpers;
            ++job_;
            part_ = &part;
            parts_ = parts;
            left_ = parts;
            ticket_.store(job_ << 32, std::memory_order_release);
        }
        wake_.notify_all();
        work();
        for (int i = 0; i < 2000 && left_.load(std::memory_order_acquire); ++i) pause();
        if (!left_.load(std::memory_order_acquire)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return left_.load(std::memory_order_acquire) == 0; });
    }

  private:
    static void pause() {
#if PYROSOME_LEVEL > 0
        _mm_pause();
#endif
    }

    void grow(int helpers) {
        while (static_cast<int>(workers_.size()) < helpers) {
            const int number = static_cast<int>(workers_.size());
            const uint64_t seen = job_.load();
            workers_.emplace_back([this, number, seen] { loop(number, seen); });
            workers_.back().detach();
        }
    }

    void loop(int number, uint64_t seen) {
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return job_ != seen; });
                seen = job_;
                if (number >= wanted_) continue;
            }
            work();
        }
    }

    // A ticket is a job's number and a part's.  While a part of a job is not done the next job cannot begin, so what is
    // read below for a valid ticket is of its job; one of an earlier job is void.
    void work() {
        for (;;) {
            const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
            const auto i = static_cast<int64_t>(ticket & 0xFFFFFFFFu);
            if (ticket >> 32 != (job_.load(std::memory_order_acquire) & 0xFFFFFFFFu) || i >= parts_) return;
            (*part_)(i);
            if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> lock(mutex_);
                done_.notify_one();
            }
        }
    }

    static Pool* current_;
    std::mutex job_mutex_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    std::atomic<const std::function<void(int64_t)>*> part_{nullptr};
    std::atomic<int64_t> parts_{0}, left_{0};
    std::atomic<uint64_t> ticket_{0}, job_{0};
    int wanted_ = 0;
};

Pool* Pool::current_ = nullptr;

}  // namespace

void parallel(int64_t parts, int threads, const std::function<void(int64_t)>& part) {
    Pool::get().run(parts, threads, part);
}
