// Activations: memory-bound once the functions of simd.h are vectors.
#pragma once

#include "simd.h"

namespace {

const int64_t STRETCH = 4096;  // floats of one task

template <class Function>
INLINE void map(const float *input, float *output, int64_t count, Function function) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(output + i, function(load(input + i)));
    if (i < count) store_part(output + i, function(load_part(input + i, count - i)), count - i);
}

int gelu(const float *input, float *output, int64_t count) {
#pragma omp parallel for schedule(static) if (count >= PARALLEL_FROM)
    for (int64_t start = 0; start < count; start += STRETCH)
        map(input + start, output + start, least(STRETCH, count - start),
            [](vfloat x) { return gelu_of(x); });
    return 0;
}

int silu(const float *input, float *output, int64_t count) {
#pragma omp parallel for schedule(static) if (count >= PARALLEL_FROM)
    for (int64_t start = 0; start < count; start += STRETCH)
        map(input + start, output + start, least(STRETCH, count - start),
            [](vfloat x) { return silu_of(x); });
    return 0;
}

// rows x (2 * columns) to rows x columns: the first half times gelu of the second.
int geglu(const float *input, float *output, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns >= PARALLEL_FROM)
    for (int64_t row = 0; row < rows; ++row) {
        const float *plain = input + row * 2 * columns, *gate = plain + columns;
        float *to = output + row * columns;
        int64_t j = 0;
        for (; j + WIDTH <= columns; j += WIDTH) store(to + j, load(plain + j) * gelu_of(load(gate + j)));
        if (j < columns) {
            const int64_t left = columns - j;
            store_part(to + j, load_part(plain + j, left) * gelu_of(load_part(gate + j, left)), left);
        }
    }
    return 0;
}

}  // namespace
