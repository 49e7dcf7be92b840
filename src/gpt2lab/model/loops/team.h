// Threads that go through the same loops together, and share each of them.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <thread>

// OpenMP's threads, but not its barriers: those put a thread to sleep at once where a program has more threads of OpenMP than
// the machine has cores, idle ones too, and a step of a small model is over before it wakes.
class Team {
    static constexpr int64_t PATIENCE = 4000;  // looks at the others, some 40 ns each
    std::atomic<int64_t> arrived{0}, round{0};

   public:
    void meet() {  // wait until all are here
        const int64_t now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int64_t looks = 0; round.load(std::memory_order_acquire) == now; ++looks) {
            if (looks < PATIENCE) {
                _mm_pause();
            } else {
                std::this_thread::yield();
            }
        }
    }

    template <typename Each>
    void share(int64_t count, Each each) {  // call it with 0 to count - 1, one after the other in each thread
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t i = count * me / all; i < count * (me + 1) / all; ++i) each(i);
        meet();
    }
};
