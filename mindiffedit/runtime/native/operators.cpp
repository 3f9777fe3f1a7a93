// What MindSpore calls: one function per operator, with the signature of its ahead-of-time custom operators.
// Each checks types and shapes, and calls the kernel for this processor.
//
// params, ndims, shapes and dtypes list the inputs first, then the output. Numbers that are no tensors (eps,
// heads) come as a last input, a short float32 vector.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "table.h"

extern const Kernels kernels_baseline;
#ifdef WITH_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef WITH_AVX512
extern const Kernels kernels_avx512;
#endif

#define OPERATOR extern "C" __attribute__((visibility("default")))
#define ARGUMENTS int nparam, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *, void *

namespace {

enum { REFUSED = 1 };

struct Choice {
    const Kernels *kernels;
    const char *name;
};

// The best that the processor has, or less where MINDIFFEDIT_NATIVE_ISA asks for less.
Choice choose() {
    const char *wish = getenv("MINDIFFEDIT_NATIVE_ISA");
    int most = 2;
    if (wish && !strcmp(wish, "baseline")) most = 0;
    if (wish && !strcmp(wish, "avx2")) most = 1;
    (void)most;
#ifdef WITH_AVX512
    if (most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("fma"))
        return {&kernels_avx512, "avx512"};
#endif
#ifdef WITH_AVX2
    if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return {&kernels_avx2, "avx2"};
#endif
    return {&kernels_baseline, "baseline"};
}

const Choice &chosen() {
    static const Choice choice = choose();
    return choice;
}

// The tensors of a call; `good` is false once one is not what was expected.
struct Call {
    int count;
    void **params;
    int *ndims;
    int64_t **shapes;
    bool good;

    Call(int expected, int nparam, void **p, int *n, int64_t **s, const char **dtypes)
        : count(nparam), params(p), ndims(n), shapes(s), good(nparam == expected) {
        for (int i = 0; good && i < count; ++i) good = !strcmp(dtypes[i], "float32");
    }
    const float *in(int i) const { return (const float *)params[i]; }
    float *out() const { return (float *)params[count - 1]; }
    int64_t size(int i, int axis) const { return shapes[i][axis < 0 ? ndims[i] + axis : axis]; }
    // Product of the axes from `first` on, `end` left out.
    int64_t product(int i, int first, int end) const {
        int64_t result = 1;
        for (int axis = first; axis < end; ++axis) result *= shapes[i][axis];
        return result;
    }
    int64_t total(int i) const { return product(i, 0, ndims[i]); }
    void rank(int i, int expected) { good = good && ndims[i] == expected; }
    void vector(int i, int64_t length) {
        rank(i, 1);
        good = good && shapes[i][0] == length;
    }
    void expect(bool fits) { good = good && fits; }
    void same(int a, int b) {
        good = good && ndims[a] == ndims[b];
        for (int axis = 0; good && axis < ndims[a]; ++axis) good = shapes[a][axis] == shapes[b][axis];
    }
};

int64_t integer(float value) { return value >= 0 && value < 1e6f ? (int64_t)value : -1; }

int elementwise(int (*kernel)(const float *, float *, int64_t), ARGUMENTS) {
    Call call(2, nparam, params, ndims, shapes, dtypes);
    if (call.good) call.same(0, 1);
    return call.good ? kernel(call.in(0), call.out(), call.total(0)) : REFUSED;
}

// input, weight, bias, [shift,] numbers (groups, eps, silu), output
int group_norm(bool tokens, ARGUMENTS) {
    const bool shifted = nparam == 6;
    Call call(shifted ? 6 : 5, nparam, params, ndims, shapes, dtypes);
    if (!call.good) return REFUSED;
    call.expect(ndims[0] >= 3);
    if (!call.good) return REFUSED;
    const int64_t batch = call.size(0, 0), channels = call.size(0, 1);
    const int64_t pixels = call.product(0, 2, ndims[0]);
    call.vector(1, channels);
    call.vector(2, channels);
    call.vector(nparam - 2, 3);
    if (shifted) {
        call.rank(3, 2);
        call.expect(call.good && call.size(3, 0) == batch && call.size(3, 1) == channels);
    }
    if (tokens) {
        call.rank(nparam - 1, 3);
        call.expect(call.good && call.size(nparam - 1, 0) == batch && call.size(nparam - 1, 1) == pixels &&
                    call.size(nparam - 1, 2) == channels);
    } else {
        call.same(0, nparam - 1);
    }
    if (!call.good) return REFUSED;
    const float *numbers = call.in(nparam - 2);
    const int64_t groups = integer(numbers[0]);
    if (groups < 1 || channels % groups || !(numbers[1] >= 0)) return REFUSED;
    if (batch * channels * pixels == 0) return 0;
    return chosen().kernels->group_norm(call.in(0), call.in(1), call.in(2), shifted ? call.in(3) : 0,
                                        call.out(), batch, channels, pixels, groups, numbers[1],
                                        numbers[2] != 0, tokens);
}

// input, weight, [bias,] a tensor of shape (stride, padding + 1) and any values, output
int conv2d(ARGUMENTS) {
    const bool biased = nparam == 5;
    Call call(biased ? 5 : 4, nparam, params, ndims, shapes, dtypes);
    if (!call.good) return REFUSED;
    const int last = nparam - 1;
    call.rank(0, 4);
    call.rank(1, 4);
    call.rank(last, 4);
    call.rank(last - 1, 2);
    if (!call.good) return REFUSED;
    const int64_t filters = call.size(1, 0);
    if (biased) call.vector(2, filters);
    const int64_t rows = call.size(1, 2), columns = call.size(1, 3);
    const int64_t stride = call.size(last - 1, 0), padding = call.size(last - 1, 1) - 1;
    call.expect(call.size(0, 1) == call.size(1, 1) && rows >= 1 && rows <= 3 && columns >= 1 && columns <= 3);
    call.expect(stride >= 1 && stride <= 3 && padding >= 0 && padding < (rows < columns ? rows : columns));
    if (!call.good) return REFUSED;
    const int64_t height = call.size(0, 2) + 2 * padding - rows,
                  width = call.size(0, 3) + 2 * padding - columns;
    call.expect(height >= 0 && width >= 0 && call.size(0, 1) > 0);
    call.expect(call.size(last, 0) == call.size(0, 0) && call.size(last, 1) == filters);
    if (!call.good) return REFUSED;
    call.expect(call.size(last, 2) == height / stride + 1 && call.size(last, 3) == width / stride + 1);
    if (!call.good) return REFUSED;
    return chosen().kernels->conv2d(call.in(0), call.in(1), biased ? call.in(2) : 0, call.out(),
                                    call.size(0, 0), call.size(0, 1), call.size(0, 2), call.size(0, 3), filters,
                                    rows, columns, stride, padding);
}

}  // namespace

OPERATOR const char *mindiffedit_instruction_set() { return chosen().name; }

// query, key, value, numbers (heads, scale), output
OPERATOR int Attention(ARGUMENTS) {
    Call call(5, nparam, params, ndims, shapes, dtypes);
    if (!call.good) return REFUSED;
    for (int i = 0; i < 3; ++i) call.rank(i, 3);
    call.vector(3, 2);
    call.same(1, 2);
    call.same(0, 4);
    if (!call.good) return REFUSED;
    const int64_t batch = call.size(0, 0), queries = call.size(0, 1), width = call.size(0, 2);
    const int64_t keys = call.size(1, 1), heads = integer(call.in(3)[0]);
    const double scale = call.in(3)[1];
    call.expect(call.size(1, 0) == batch && call.size(1, 2) == width && keys >= 1);
    // A scale of zero would turn the padding's minus infinity into NaN; nobody means it.
    call.expect(heads >= 1 && width % heads == 0 && width / heads <= 1024 && scale != 0 && isfinite(scale));
    if (!call.good) return REFUSED;
    if (batch * queries * width == 0) return 0;
    return chosen().kernels->attention(call.in(0), call.in(1), call.in(2), call.out(), batch, queries, keys,
                                       heads, width / heads, scale);
}

// input, output
OPERATOR int Gelu(ARGUMENTS) {
    return elementwise(chosen().kernels->gelu, nparam, params, ndims, shapes, dtypes, 0, 0);
}

// input, output
OPERATOR int Silu(ARGUMENTS) {
    return elementwise(chosen().kernels->silu, nparam, params, ndims, shapes, dtypes, 0, 0);
}

// input (..., 2 * columns), [bias,] output (..., columns)
OPERATOR int Geglu(ARGUMENTS) {
    const bool biased = nparam == 3;
    const int last = biased ? 2 : 1;
    Call call(last + 1, nparam, params, ndims, shapes, dtypes);
    call.expect(call.good && ndims[0] >= 1 && ndims[0] == ndims[last]);
    if (!call.good) return REFUSED;
    for (int axis = 0; axis < ndims[0] - 1; ++axis) call.expect(shapes[0][axis] == shapes[last][axis]);
    const int64_t columns = call.size(last, -1);
    call.expect(call.size(0, -1) == 2 * columns);
    if (biased) call.vector(1, 2 * columns);
    if (!call.good) return REFUSED;
    return chosen().kernels->geglu(call.in(0), biased ? call.in(1) : 0, call.out(),
                                   call.product(0, 0, ndims[0] - 1), columns);
}

OPERATOR int GroupNorm(ARGUMENTS) { return group_norm(false, nparam, params, ndims, shapes, dtypes, 0, 0); }

OPERATOR int GroupNormTokens(ARGUMENTS) {
    return group_norm(true, nparam, params, ndims, shapes, dtypes, 0, 0);
}

// input, weight, bias, numbers (eps), output
OPERATOR int LayerNorm(ARGUMENTS) {
    Call call(5, nparam, params, ndims, shapes, dtypes);
    call.expect(call.good && ndims[0] >= 1);
    if (!call.good) return REFUSED;
    const int64_t columns = call.size(0, -1);
    call.vector(1, columns);
    call.vector(2, columns);
    call.vector(3, 1);
    call.same(0, 4);
    if (!call.good || !(call.in(3)[0] >= 0)) return REFUSED;
    if (call.total(0) == 0) return 0;
    return chosen().kernels->layer_norm(call.in(0), call.in(1), call.in(2), call.out(),
                                        call.product(0, 0, ndims[0] - 1), columns, call.in(3)[0]);
}

// tokens (batch, pixels, channels), residual of the output's shape, output (batch, channels, height, width)
OPERATOR int TokensToImage(ARGUMENTS) {
    Call call(3, nparam, params, ndims, shapes, dtypes);
    if (!call.good) return REFUSED;
    call.rank(0, 3);
    call.rank(2, 4);
    call.same(1, 2);
    if (!call.good) return REFUSED;
    const int64_t batch = call.size(0, 0), pixels = call.size(0, 1), channels = call.size(0, 2);
    call.expect(call.size(2, 0) == batch && call.size(2, 1) == channels && call.product(2, 2, 4) == pixels);
    if (!call.good) return REFUSED;
    return chosen().kernels->tokens_to_image(call.in(0), call.in(1), call.out(), batch, channels, pixels);
}

// image (batch, channels, ...), output (batch, pixels, channels)
OPERATOR int ImageToTokens(ARGUMENTS) {
    Call call(2, nparam, params, ndims, shapes, dtypes);
    call.expect(call.good && ndims[0] >= 3);
    if (!call.good) return REFUSED;
    call.rank(1, 3);
    if (!call.good) return REFUSED;
    const int64_t batch = call.size(0, 0), channels = call.size(0, 1), pixels = call.product(0, 2, ndims[0]);
    call.expect(call.size(1, 0) == batch && call.size(1, 1) == pixels && call.size(1, 2) == channels);
    if (!call.good) return REFUSED;
    return chosen().kernels->image_to_tokens(call.in(0), call.out(), batch, channels, pixels);
}

OPERATOR int Conv2dPrecise(ARGUMENTS) { return conv2d(nparam, params, ndims, shapes, dtypes, 0, 0); }

// input (batch, channels, ...), bias, [residual,] output
OPERATOR int BiasAddResidual(ARGUMENTS) {
    const bool residual = nparam == 4;
    Call call(residual ? 4 : 3, nparam, params, ndims, shapes, dtypes);
    call.expect(call.good && ndims[0] >= 2);
    if (!call.good) return REFUSED;
    const int64_t batch = call.size(0, 0), channels = call.size(0, 1);
    call.vector(1, channels);
    call.same(0, nparam - 1);
    if (residual && call.good) call.same(0, 2);
    if (!call.good) return REFUSED;
    return chosen().kernels->bias_add(call.in(0), call.in(1), residual ? call.in(2) : 0, call.out(), batch,
                                      channels, call.product(0, 2, ndims[0]));
}

// input (..., columns), bias, [residual,] output
OPERATOR int BiasAddTokens(ARGUMENTS) {
    const bool residual = nparam == 4;
    Call call(residual ? 4 : 3, nparam, params, ndims, shapes, dtypes);
    call.expect(call.good && ndims[0] >= 1);
    if (!call.good) return REFUSED;
    const int64_t columns = call.size(0, -1);
    call.vector(1, columns);
    call.same(0, nparam - 1);
    if (residual && call.good) call.same(0, 2);
    if (!call.good) return REFUSED;
    return chosen().kernels->bias_add_tokens(call.in(0), call.in(1), residual ? call.in(2) : 0, call.out(),
                                             call.product(0, 0, ndims[0] - 1), columns);
}

// first, second, output: joined on axis 1
OPERATOR int ConcatChannels(ARGUMENTS) {
    Call call(3, nparam, params, ndims, shapes, dtypes);
    call.expect(call.good && ndims[0] >= 2 && ndims[0] == ndims[1] && ndims[0] == ndims[2]);
    if (!call.good) return REFUSED;
    for (int axis = 0; axis < ndims[0]; ++axis) {
        if (axis == 1)
            call.expect(call.size(2, 1) == call.size(0, 1) + call.size(1, 1));
        else
            call.expect(call.size(0, axis) == call.size(1, axis) && call.size(0, axis) == call.size(2, axis));
    }
    if (!call.good) return REFUSED;
    return chosen().kernels->concat(call.in(0), call.in(1), call.out(), call.size(0, 0),
                                    call.product(0, 1, ndims[0]), call.product(1, 1, ndims[1]));
}

// input (batch, channels, height, width), output (batch, channels, 2 * height, 2 * width)
OPERATOR int UpsampleNearest2x(ARGUMENTS) {
    Call call(2, nparam, params, ndims, shapes, dtypes);
    if (!call.good) return REFUSED;
    call.rank(0, 4);
    call.rank(1, 4);
    if (!call.good) return REFUSED;
    for (int axis = 0; axis < 4; ++axis)
        call.expect(call.size(1, axis) == (axis < 2 ? 1 : 2) * call.size(0, axis));
    if (!call.good) return REFUSED;
    return chosen().kernels->upsample(call.in(0), call.out(), call.product(0, 0, 2), call.size(0, 2),
                                      call.size(0, 3));
}
