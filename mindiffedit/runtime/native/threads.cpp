// The threads of the kernels: a few that sleep until there is work.
//
// OpenMP's would do, but they stay awake for milliseconds after each loop, to be quick at the next. MindSpore's
// own operators run on threads of its own, and those then wait for a core: a UNet took half as long again.

#include <pthread.h>
#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#include "parallel.h"

namespace {

std::atomic<int> wanted{1};

class Pool {
 public:
    void run(int64_t count, int64_t grain, void (*body)(void *, int64_t, int64_t), void *data) {
        // One loop at a time. Another one that comes meanwhile, from another thread of MindSpore's or from
        // within the loop, is run by its caller alone.
        std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
        if (!alone.owns_lock() || !start()) {
            body(data, 0, count);
            return;
        }
        if (grain <= 0) grain = count / (4 * (workers_ + 1));
        {
            std::lock_guard<std::mutex> lock(mutex_);
            body_ = body, data_ = data, count_ = count, grain_ = grain > 1 ? grain : 1;
            next_.store(0, std::memory_order_relaxed);
            ++loop_;
            open_ = true;
        }
        wake_.notify_all();
        work();
        // Whoever wakes up from here on finds nothing to do; those at work have to end before `data` goes.
        std::unique_lock<std::mutex> lock(mutex_);
        open_ = false;
        done_.wait(lock, [this] { return working_ == 0; });
    }

 private:
    void work() {
        for (;;) {
            const int64_t first = next_.fetch_add(grain_, std::memory_order_relaxed);
            if (first >= count_) return;
            body_(data_, first, first + grain_ < count_ ? first + grain_ : count_);
        }
    }

    // Makes the threads when they are first needed; false where there is but one core, or none to be had.
    bool start() {
        if (workers_ >= 0) return workers_ > 0;
        workers_ = 0;
        for (int i = 1; i < wanted.load(); ++i) {
            pthread_t thread;
            if (pthread_create(&thread, nullptr, &Pool::wait_and_work, this) != 0) break;
            pthread_detach(thread);
            ++workers_;
        }
        return workers_ > 0;
    }

    static void *wait_and_work(void *self) {
        Pool &pool = *(Pool *)self;
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(pool.mutex_);
        for (;;) {
            pool.wake_.wait(lock, [&] { return pool.open_ && pool.loop_ != seen; });
            seen = pool.loop_;
            ++pool.working_;
            lock.unlock();
            pool.work();
            lock.lock();
            if (--pool.working_ == 0) pool.done_.notify_one();
        }
        return nullptr;
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    int workers_ = -1, working_ = 0;
    bool open_ = false;
    uint64_t loop_ = 0;
    void (*body_)(void *, int64_t, int64_t) = nullptr;
    void *data_ = nullptr;
    int64_t count_ = 0, grain_ = 1;
    std::atomic<int64_t> next_{0};
};

// Never destroyed: the threads outlive main's end.
alignas(Pool) char storage[sizeof(Pool)];
Pool *pool = nullptr;
std::once_flag once;

void renew() { pool = new (storage) Pool; }

}  // namespace

// How many threads, the caller's included; before the first loop. Not from OMP_NUM_THREADS: MindSpore sets that
// in its process where it is not set, to an eighth of the cores.
extern "C" __attribute__((visibility("default"))) void mindiffedit_threads(int number) {
    wanted.store(number < 1 ? 1 : number > 256 ? 256 : number);
}

extern "C" void mindiffedit_parallel(int64_t count, int64_t grain, void (*body)(void *, int64_t, int64_t),
                                     void *data) {
    std::call_once(once, [] {
        renew();
        // A child process has none of the threads, and a lock may have been held: it begins afresh.
        pthread_atfork(nullptr, nullptr, renew);
    });
    pool->run(count, grain, body, data);
}
