#include "native.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <vector>

static std::atomic<int> forced{-1};

Level level() {
#if X86
    static const Level found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
                                   ? LEVEL_AVX512
                               : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? LEVEL_AVX2
                                                                                                : PORTABLE;
#else
    static const Level found = PORTABLE;
#endif
    const int asked = forced.load(std::memory_order_relaxed);
    return asked >= 0 && asked < found ? static_cast<Level>(asked) : found;
}

static std::atomic<int64_t> grain{1 << 18};

int worth(int64_t operations, int threads) {
    const int64_t most = 1 + operations / grain.load(std::memory_order_relaxed);
    return static_cast<int>(most < threads ? most : threads);
}

// Operations that are worth a thread (tests make it small, to have many).
EXPORT void pyrosome_set_grain(int64_t operations) { grain = operations > 0 ? operations : 1 << 18; }

EXPORT int pyrosome_level() { return level(); }
EXPORT void pyrosome_force_level(int asked) { forced = asked; }

namespace {

// Workers sleep between jobs: a spinning pool collapses when another process shares its cores.
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
        std::unique_lock<std::mutex> one_job(job_mutex_, std::try_to_lock);
        if (threads <= 1 || parts <= 1 || !one_job) {  // a second caller at the same time works alone
            for (int64_t i = 0; i < parts; ++i) part(i);
            return;
        }
        const int helpers = static_cast<int>(std::min<int64_t>(threads, parts)) - 1;
        grow(helpers);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            part_ = &part;
            parts_ = parts;
            next_ = 0;
            wanted_ = running_ = helpers;
            ++job_;
        }
        wake_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return running_ == 0; });
        part_ = nullptr;
    }

  private:
    void grow(int helpers) {
        while (static_cast<int>(workers_.size()) < helpers) {
            const int number = static_cast<int>(workers_.size());
            const uint64_t seen = job_;
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
            std::lock_guard<std::mutex> lock(mutex_);
            if (--running_ == 0) done_.notify_one();
        }
    }

    void work() {
        for (int64_t i; (i = next_.fetch_add(1)) < parts_;) (*part_)(i);
    }

    static Pool* current_;
    std::mutex job_mutex_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    const std::function<void(int64_t)>* part_ = nullptr;
    int64_t parts_ = 0;
    std::atomic<int64_t> next_{0};
    int wanted_ = 0, running_ = 0;
    uint64_t job_ = 0;
};

Pool* Pool::current_ = nullptr;

}  // namespace

void parallel(int64_t parts, int threads, const std::function<void(int64_t)>& part) {
    Pool::get().run(parts, threads, part);
}
