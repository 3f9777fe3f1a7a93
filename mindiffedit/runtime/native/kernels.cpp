// The kernels of one instruction set. The build compiles this file several times, with KERNELS defined as the
// name of the table; see table.h.
#include "attention.h"
#include "convolution.h"
#include "elementwise.h"
#include "layout.h"
#include "norms.h"

#ifndef KERNELS
#error "KERNELS: expected the name of this instruction set's table"
#endif

extern const Kernels KERNELS;
const Kernels KERNELS = {
    attention,       geglu,           gelu,   silu,     group_norm,      layer_norm,
    tokens_to_image, image_to_tokens, conv2d, bias_add, bias_add_tokens, concat,
    upsample,
};
