// Vectors of the widest kind that the compiler's flags allow, and what is computed with them.
//
// Written with the vector extensions of GCC and Clang, so that one text serves SSE2, AVX2, AVX-512 and NEON.
// Everything is static: see table.h. No standard templates are used for the same reason.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "table.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

// Rows of the register block of a matrix product, which has three vectors in each row: 8 x 3 sums, 3 vectors
// and one broadcast fill 28 of 32 registers, 4 x 3 fill all 16.
#if defined(__AVX512F__) || defined(__aarch64__)
#define BLOCK_ROWS 8
#else
#define BLOCK_ROWS 4
#endif
#define BLOCK_VECTORS 3

namespace {

typedef float vfloat __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(VECTOR_BYTES)));
typedef float vhalf __attribute__((vector_size(VECTOR_BYTES / 2)));  // as long as a vdouble

// The same, at any address.
typedef float vfloat_at __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef double vdouble_at __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
typedef float vhalf_at __attribute__((vector_size(VECTOR_BYTES / 2), aligned(4), may_alias));

const int64_t WIDTH = VECTOR_BYTES / 4;    // floats in a vector
const int64_t WIDTH64 = VECTOR_BYTES / 8;  // doubles in a vector

INLINE vfloat load(const float *from) { return *(const vfloat_at *)from; }
INLINE vdouble load(const double *from) { return *(const vdouble_at *)from; }
INLINE void store(float *to, vfloat value) { *(vfloat_at *)to = value; }
INLINE void store(double *to, vdouble value) { *(vdouble_at *)to = value; }

INLINE vdouble load_wide(const float *from) {
    return __builtin_convertvector((vhalf) * (const vhalf_at *)from, vdouble);
}
INLINE void store_narrow(float *to, vdouble value) {
    *(vhalf_at *)to = __builtin_convertvector(value, vhalf);
}

// The first `count` values; the rest is zero, or left alone.
INLINE vfloat load_part(const float *from, int64_t count) {
    float values[WIDTH] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
    return load(values);
}
INLINE void store_part(float *to, vfloat value, int64_t count) {
    float values[WIDTH];
    store(values, value);
    for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

INLINE vfloat spread(float value) { return vfloat{} + value; }
INLINE vdouble spread64(double value) { return vdouble{} + value; }

INLINE float sum_of(vfloat value) {
    float sum = 0;
    for (int64_t i = 0; i < WIDTH; ++i) sum += value[i];
    return sum;
}
INLINE double sum_of(vdouble value) {
    double sum = 0;
    for (int64_t i = 0; i < WIDTH64; ++i) sum += value[i];
    return sum;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }
INLINE int64_t round_up(int64_t count, int64_t size) { return parts(count, size) * size; }

template <class T>
INLINE T *allocate(int64_t count) {
    return (T *)aligned_alloc(64, (size_t)round_up(count * (int64_t)sizeof(T) + 64, 64));
}

// --- functions of a vector --------------------------------------------------------------------------
//
// Polynomials fitted at Chebyshev nodes. Adding 1.5 * 2**23 rounds a float to an integer, which is then in the
// low bits of its mantissa; shifted by 23 it is ready to be added to another float's exponent.

const float ROUNDER = 12582912.0f;

INLINE vfloat select(vint mask, vfloat yes, vfloat no) { return mask ? yes : no; }

// 2**x for x up to 127; 0 below 2**-126, NaN for NaN. Error: 1 unit in the last place.
INLINE vfloat exp2_small(vfloat x) {
    vfloat rounded = x + ROUNDER;
    vfloat f = x - (rounded - ROUNDER);
    vfloat p = 1.54614478e-4f * f + 1.33908668e-3f;
    p = p * f + 9.61805694e-3f;
    p = p * f + 5.55035695e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    vfloat result = (vfloat)((vint)p + ((vint)rounded << 23));
    return select(x < -126.0f, vfloat{}, result);
}

// e**x: 0 below 2**-126, infinity above the largest float, NaN for NaN. Error: 1 unit in the last place.
INLINE vfloat exp_full(vfloat x) {
    vfloat rounded = x * 1.44269502f + ROUNDER;
    vfloat n = rounded - ROUNDER;
    // ln 2 in two parts, the first so short that its product with n is exact.
    vfloat r = (x - n * 0.69314575f) - n * 1.42860677e-6f;
    vfloat p = 1.39336882e-3f * r + 8.36320501e-3f;
    p = p * r + 4.1666463e-2f;
    p = p * r + 1.66665763e-1f;
    p = p * r + 0.5f;
    // 1 last, so that only the final addition rounds at the size of the result.
    vfloat result = (vfloat)((vint)((p * (r * r) + r) + 1.0f) + ((vint)rounded << 23));
    result = select(x < -87.33654f, vfloat{}, result);
    return select(x > 88.72283f, spread(INFINITY), result);
}

INLINE vfloat silu_of(vfloat x) { return x / (1.0f + exp_full(-x)); }

// x * P(normal < x). The probability of the tail is exp(-a*a/2) * h / (1 + a) with a = |x| and h a polynomial
// of (a - 4) / (a + 4), so that it is accurate relative to itself, where 1 + erf would cancel.
INLINE vfloat gelu_of(vfloat x) {
    vfloat a = (vfloat)((vint)x & 0x7fffffff);
    a = select(a > 14.0f, spread(14.0f), a);  // the tail is zero long before; keeps infinity out, NaN in
    vfloat u = (a - 4.0f) / (a + 4.0f);
    vfloat h = -7.24080601e-5f * u + -6.22589432e-5f;
    h = h * u + 6.92503876e-4f;
    h = h * u + -3.02478205e-4f;
    h = h * u + -5.00377268e-3f;
    h = h * u + 1.79398973e-2f;
    h = h * u + -3.21974419e-2f;
    h = h * u + 2.86000073e-2f;
    h = h * u + 1.39996102e-2f;
    h = h * u + -9.67034698e-2f;
    h = h * u + 4.720532e-1f;
    // The rounding error of a*a, 2**-24 of up to 170, would show in its exponential. `upper` has 12 bits, so
    // its square is exact.
    vfloat square = a * a;
    vfloat upper = (vfloat)((vint)a & ~0xfff);
    vfloat lost = (upper * upper - square) + (a - upper) * (a + upper);
    vfloat e = exp_full(-0.5f * square);
    e = e - e * (0.5f * lost);
    vfloat tail = e * h / (1.0f + a);
    return x * select(x < 0.0f, tail, 1.0f - tail);
}

// --- matrix products -----------------------------------------------------------------------------------

// The types of a product: of floats, of doubles.
struct Single {
    typedef float scalar;
    typedef vfloat vector;
    static const int64_t width = WIDTH;
    static const int64_t chunk = 96;
};
struct Double {
    typedef double scalar;
    typedef vdouble vector;
    static const int64_t width = WIDTH64;
    static const int64_t chunk = INT64_MAX / 2;  // float64 has digits to spare
};

// Vectors in the next panel of columns when `left` are left: 3, but 2 and 2 rather than 3 and 1.
INLINE int64_t panel(int64_t left) { return left == 4 ? 2 : least(left, BLOCK_VECTORS); }

// sum[r][v] = sum over k < depth of left[r * stride + k] * row(k)[v]: the innermost loop of every product.
// The sums stay in registers. After every `Type::chunk` products they are put aside and begin anew: one long
// sum would lose more digits.
template <class Type, int ROWS, int VECTORS, class Row>
INLINE void multiply(typename Type::vector (&sum)[ROWS][VECTORS], int64_t depth,
                     const typename Type::scalar *left, int64_t stride, Row row) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = typename Type::vector{};
    for (int64_t start = 0; start < depth; start += Type::chunk) {
        const int64_t end = least(depth, start + Type::chunk);
        typename Type::vector sums[ROWS][VECTORS] = {};
        for (int64_t k = start; k < end; ++k) {
            const typename Type::scalar *at = row(k);
            typename Type::vector right[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) right[v] = load(at + v * Type::width);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const typename Type::scalar factor = left[r * stride + k];
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * right[v];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[r][v] += sums[r][v];
    }
}

}  // namespace
