// Loops over the threads of threads.cpp, from the files that are compiled once per instruction set.
#pragma once

#include <stdint.h>

// Calls body(data, first, last) for stretches that cover 0 to count, from several threads at once, and returns
// when all are done. A stretch has at least `grain` numbers; 0 leaves it to the function.
extern "C" void mindiffedit_parallel(int64_t count, int64_t grain, void (*body)(void *, int64_t, int64_t),
                                     void *data);

namespace {

// body(first, last) for stretches of 0 to count; all at once, on this thread, where the work is not `worth` it.
template <class Body>
inline void stretches(int64_t count, int64_t grain, bool worth, Body body) {
    if (!worth) {
        body((int64_t)0, count);
        return;
    }
    mindiffedit_parallel(
        count, grain, [](void *data, int64_t first, int64_t last) { (*(Body *)data)(first, last); }, &body);
}

// body(i) for every i from 0 to count.
template <class Body>
inline void each(int64_t count, bool worth, Body body) {
    stretches(count, 0, worth, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) body(i);
    });
}

}  // namespace
