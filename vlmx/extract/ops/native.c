/* How are the selective scans, and the convolution before them, computed fast on a CPU, in plain C?

   16 neighbouring channels are one vector, so every lane is a channel: no lane waits for another, and the only chain of
   dependent steps (the recurrence) costs one multiply-add a token. Vectors are the compiler's (GCC, Clang), so the same
   code runs on AVX-512, AVX2 and NEON. Compiled by native.py, without -ffast-math: what is fast here is written out,
   and what is written out depends on rounding as IEEE 754 has it.

   Tasks are (image, block of channels), numbered image by image; each function computes the tasks begin .. end - 1, so
   that threads can share them. Everything is float32 and dense in its last axis; strides count floats. */

#include <stdint.h>
#include <string.h>

enum { LANES = 16, TILE = 4, MOST_STATES = 64 };

typedef float vec __attribute__((vector_size(64)));
typedef int32_t bits __attribute__((vector_size(64)));
typedef float loose __attribute__((vector_size(64), aligned(4), may_alias)); /* in memory, at any float */

#define INLINE static inline __attribute__((always_inline))

INLINE vec all(float x) { return x - (vec){0}; }

/* the first n floats at p; n is a constant of 16 in all blocks but the last */
INLINE vec load(const float *p, int n) {
    if (n == LANES) return *(const loose *)p;
    vec x = {0};
    memcpy(&x, p, n * sizeof(float));
    return x;
}

INLINE void store(float *p, vec x, int n) {
    if (n == LANES) *(loose *)p = x;
    else memcpy(p, &x, n * sizeof(float));
}

INLINE vec either(bits mask, vec yes, vec no) { return (vec)(((bits)yes & mask) | ((bits)no & ~mask)); }
INLINE vec at_least(vec x, float low) { return either(x < low, all(low), x); } /* NaN stays NaN, also below */
INLINE vec at_most(vec x, float high) { return either(x > high, all(high), x); }

/* The functions below work on `count` vectors at once, step by step: no step of one waits for the step before it of
   another, which hides that each takes several cycles. */
#define EACH for (int i = 0; i < count; i++)

/* 2^x for x <= 126, relative error 1e-7; below -126 it stays at 2^-126, which is 0 for all that it multiplies.
   Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, which are the exponent to be. */
INLINE void exp2_(vec *x, int count) {
    vec shifted[TILE], r[TILE], y[TILE];
    EACH x[i] = at_least(x[i], -126.0f);
    EACH shifted[i] = x[i] + 12582912.0f;
    EACH r[i] = x[i] - (shifted[i] - 12582912.0f);
    EACH y[i] = 0.001326472731307149f * r[i] + 0.009671512991189957f;
    EACH y[i] = y[i] * r[i] + 0.05550733581185341f;
    EACH y[i] = y[i] * r[i] + 0.24022242426872253f;
    EACH y[i] = y[i] * r[i] + 0.6931470036506653f;
    EACH y[i] = y[i] * r[i] + 1.0f; /* exactly 1, so that decays near 1 have no bias that adds up */
    EACH x[i] = (vec)((bits)y[i] + ((bits)shifted[i] << 23));
}

/* log(1 + x) for x in 0..1, relative error 1e-7, also where 1 + x rounds to 1 */
INLINE void log1p_(vec *x, int count) {
    vec y[TILE];
    EACH y[i] = 0.005232690833508968f * x[i] - 0.029505228623747826f;
    EACH y[i] = y[i] * x[i] + 0.07822594791650772f;
    EACH y[i] = y[i] * x[i] - 0.13663245737552643f;
    EACH y[i] = y[i] * x[i] + 0.19106008112430573f;
    EACH y[i] = y[i] * x[i] - 0.2484298199415207f;
    EACH y[i] = y[i] * x[i] + 0.3331909775733948f;
    EACH y[i] = y[i] * x[i] - 0.4999949336051941f;
    EACH y[i] = y[i] * x[i] + 0.9999999403953552f;
    EACH x[i] = y[i] * x[i];
}

#define LOG2E 1.4426950408889634f

/* log(1 + e^x) = max(x, 0) + log(1 + e^-|x|) */
INLINE void softplus_(vec *x, int count) {
    vec y[TILE];
    EACH y[i] = (vec)((bits)x[i] | INT32_MIN) * LOG2E; /* -|x| */
    exp2_(y, count);
    log1p_(y, count);
    EACH x[i] = at_least(x[i], 0.0f) + y[i];
}

/* x / (1 + e^-x) */
INLINE void silu_(vec *x, int count) {
    vec y[TILE];
    EACH y[i] = at_most(x[i] * -LOG2E, 126.0f);
    exp2_(y, count);
    EACH x[i] = x[i] / (1.0f + y[i]);
}

/* --- one path of tokens, any number of states a channel ----------------------------------------------------------- */

typedef struct {
    const float *u, *dt, *B, *C, *gate; /* first token of image 0; gate may be null */
    const float *A, *skip, *bias;       /* A: (N, D), already times log2(e); skip and bias may be null */
    float *y;                           /* (images, length, D), dense */
    int64_t images, length, channels, groups, states, softplus, reverse;
    int64_t u_image, u_token, dt_image, dt_token, gate_image, gate_token; /* strides */
    int64_t B_image, B_token, B_group, C_image, C_token, C_group;
} scan_args;

INLINE void scan_block(const scan_args *a, int64_t image, int64_t first, int n, int states) {
    const int64_t group = first / (a->channels / a->groups);
    const float *u = a->u + image * a->u_image + first, *dt = a->dt + image * a->dt_image + first;
    const float *B = a->B + image * a->B_image + group * a->B_group;
    const float *C = a->C + image * a->C_image + group * a->C_group;
    const float *gate = a->gate ? a->gate + image * a->gate_image + first : 0;
    float *y = a->y + image * a->length * a->channels + first;
    const vec skip = a->skip ? load(a->skip + first, n) : all(0), bias = a->bias ? load(a->bias + first, n) : all(0);
    vec A[MOST_STATES], h[MOST_STATES];
    for (int s = 0; s < states; s++) {
        A[s] = load(a->A + s * a->channels + first, n);
        h[s] = all(0);
    }
    for (int64_t step = 0; step < a->length; step++) {
        const int64_t t = a->reverse ? a->length - 1 - step : step;
        const vec x = load(u + t * a->u_token, n);
        vec d = load(dt + t * a->dt_token, n) + bias;
        if (a->softplus) softplus_(&d, 1);
        const vec drive = d * x;
        const float *b = B + t * a->B_token, *c = C + t * a->C_token;
        vec out = skip * x;
        int s = 0;
        for (; s + TILE <= states; s += TILE) {
            vec decay[TILE];
            for (int i = 0; i < TILE; i++) decay[i] = d * A[s + i];
            exp2_(decay, TILE);
            for (int i = 0; i < TILE; i++) {
                h[s + i] = decay[i] * h[s + i] + drive * b[s + i];
                out += h[s + i] * c[s + i];
            }
        }
        for (; s < states; s++) {
            vec decay = d * A[s];
            exp2_(&decay, 1);
            h[s] = decay * h[s] + drive * b[s];
            out += h[s] * c[s];
        }
        if (gate) {
            vec z = load(gate + t * a->gate_token, n);
            silu_(&z, 1);
            out *= z;
        }
        store(y + t * a->channels, out, n);
    }
}

/* Blocks of a group do not reach into the next group. */
void vlmx_scan(const scan_args *a, int64_t begin, int64_t end) {
    const int64_t width = a->channels / a->groups, blocks = (width + LANES - 1) / LANES;
    for (int64_t task = begin; task < end; task++) {
        const int64_t block = task % blocks, group = task / blocks % a->groups, image = task / blocks / a->groups;
        const int64_t first = group * width + block * LANES;
        const int n = block + 1 < blocks ? LANES : (int)(width - block * LANES);
        if (n == LANES && a->states == 1) scan_block(a, image, first, LANES, 1);
        else if (n == LANES && a->states == 8) scan_block(a, image, first, LANES, 8);
        else if (n == LANES && a->states == 16) scan_block(a, image, first, LANES, 16);
        else scan_block(a, image, first, n, (int)a->states);
    }
}

/* --- the four paths over a grid, one state a channel -------------------------------------------------------------- */

typedef struct {
    const float *u, *low;       /* (images, cells, D); (images, cells, 4, rank + 2), all dense */
    const float *weight, *bias; /* (4, rank, D); (4, D) */
    const float *A, *skip;      /* (4, D), already times log2(e); (D) */
    const int32_t *by_columns;  /* (cells): the cell at each step of the column-major path */
    float *y;                   /* (images, cells, D) */
    int64_t images, cells, channels, rank;
} grid_args;

INLINE int64_t cell_at(const grid_args *a, int way, int64_t step) {
    if (step >= a->cells) step = a->cells - 1;
    if (way >= 2) step = a->cells - 1 - step;
    return way & 1 ? a->by_columns[step] : step;
}

/* TILE steps at a time: first what has no dependence between steps, which is most of the work, then the recurrence. */
INLINE void grid_block(const grid_args *a, int64_t image, int64_t first, int n) {
    const int64_t per_cell = 4 * (a->rank + 2), plane = a->cells * a->channels;
    const float *u = a->u + image * plane + first;
    float *y = a->y + image * plane + first;
    const vec skip = load(a->skip + first, n);
    for (int way = 0; way < 4; way++) {
        const float *low = a->low + image * a->cells * per_cell + way * (a->rank + 2);
        const float *weight = a->weight + way * a->rank * a->channels + first;
        const vec bias = load(a->bias + way * a->channels + first, n), A = load(a->A + way * a->channels + first, n);
        vec state = all(0);
        for (int64_t step = 0; step < a->cells; step += TILE) {
            const int count = TILE;
            int64_t cell[TILE];
            vec dt[TILE], decay[TILE];
            EACH {
                cell[i] = cell_at(a, way, step + i);
                /* cells of a column are too far apart for the hardware to guess the next ones */
                const int64_t next = cell_at(a, way, step + i + TILE);
                __builtin_prefetch(u + next * a->channels);
                __builtin_prefetch(y + next * a->channels, 1);
                __builtin_prefetch(low + next * per_cell);
            }
            EACH dt[i] = bias;
            for (int64_t r = 0; r < a->rank; r++) {
                const vec w = load(weight + r * a->channels, n);
                EACH dt[i] += w * low[cell[i] * per_cell + r];
            }
            softplus_(dt, TILE);
            EACH decay[i] = dt[i] * A;
            exp2_(decay, TILE);
            for (int i = 0; i < TILE && step + i < a->cells; i++) {
                const float *bc = low + cell[i] * per_cell + a->rank;
                float *out = y + cell[i] * a->channels;
                const vec x = load(u + cell[i] * a->channels, n);
                state = decay[i] * state + dt[i] * x * bc[0];
                store(out, (way ? load(out, n) : skip * x) + state * bc[1], n);
            }
        }
    }
}

void vlmx_scan_four_ways(const grid_args *a, int64_t begin, int64_t end) {
    const int64_t blocks = (a->channels + LANES - 1) / LANES;
    for (int64_t task = begin; task < end; task++) {
        const int64_t image = task / blocks, first = task % blocks * LANES;
        if (first + LANES <= a->channels) grid_block(a, image, first, LANES);
        else grid_block(a, image, first, (int)(a->channels - first));
    }
}

/* --- depthwise convolution along a path, then SiLU ---------------------------------------------------------------- */

typedef struct {
    const float *x, *weight, *bias; /* x as u above; (width, D); (D) or null */
    float *y;                       /* (images, length, D), dense */
    int64_t images, length, channels, width, before, x_image, x_token;
} conv_args;

INLINE void conv_block(const conv_args *a, int64_t image, int64_t first, int n) {
    const float *x = a->x + image * a->x_image + first, *weight = a->weight + first;
    float *y = a->y + image * a->length * a->channels + first;
    const vec bias = a->bias ? load(a->bias + first, n) : all(0);
    for (int64_t t = 0; t < a->length; t += TILE) {
        const int count = TILE;
        vec out[TILE];
        EACH out[i] = bias;
        for (int64_t j = 0; j < a->width; j++) {
            const vec w = load(weight + j * a->channels, n);
            EACH {
                const int64_t from = t + i + j - a->before;
                if (from >= 0 && from < a->length) out[i] += w * load(x + from * a->x_token, n);
            }
        }
        silu_(out, TILE);
        for (int i = 0; i < TILE && t + i < a->length; i++) store(y + (t + i) * a->channels, out[i], n);
    }
}

void vlmx_conv_silu(const conv_args *a, int64_t begin, int64_t end) {
    const int64_t blocks = (a->channels + LANES - 1) / LANES;
    for (int64_t task = begin; task < end; task++) {
        const int64_t image = task / blocks, first = task % blocks * LANES;
        if (first + LANES <= a->channels) conv_block(a, image, first, LANES);
        else conv_block(a, image, first, (int)(a->channels - first));
    }
}
