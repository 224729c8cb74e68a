// CPU kernels of Drift. `reference.py` says what each computes; `cpu.py` calls them, `native_library.py` compiles them.
//
// Plain C for GNU compilers, vector code in 16 lanes of float. Rules: no state but what drift_init sets, since two
// lanes run the same function at once; scratch is on the stack or passed in; shapes and dtypes are not checked here,
// the caller has. Elements are fp32 (dtype 0) or bf16 (dtype 1); sums are always fp32. Strides count elements.

#include "native_vectors.h"

// ---------------------------------------------------------------------------------------------------------- linear
// out[M, N] = x[M, K] w[N, K]^T + bias[N]. Weights are read once, as they lie: at small M their bytes are the cost.

struct linear {
    const void *x, *w, *bias;
    void *out;
    uint16_t *packed;  // AMX: M rounded up to 16, times K
    long M, N, K, ldx;
    int dtype, level;
};

static __attribute__((noinline)) void finish(const struct linear *a, long m, long n, float s) {
    if (a->dtype == BF16) {
        uint16_t *out = (uint16_t *)a->out + m * a->N + n;
        if (a->bias) s += widen((half){((const uint16_t *)a->bias)[n]})[0];
        *out = narrow(splat(s))[0];
    } else {
        ((float *)a->out)[m * a->N + n] = s + (a->bias ? ((const float *)a->bias)[n] : 0);
    }
}

INLINE void dots(const struct linear *a, long m, long n, int rows, int cols, int dtype) {
    vec acc[4][4] = {0};
    for (long k = 0; k < a->K; k += 16) {
        vec w[4];
        for (int j = 0; j < cols; j++) w[j] = load(a->w, (n + j) * a->K + k, dtype);
        for (int i = 0; i < rows; i++) {
            vec x = load(a->x, (m + i) * a->ldx + k, dtype);
            for (int j = 0; j < cols; j++) acc[i][j] += x * w[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) finish(a, m + i, n + j, sum(acc[i][j]));
}

#ifdef HAVE_DPBF16
INLINE void dots_bf16(const struct linear *a, long m, long n, int rows, int cols) {
    const uint16_t *wp = a->w, *xp = a->x;
    __m512 acc[4][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) acc[i][j] = _mm512_setzero_ps();
    for (long k = 0; k < a->K; k += 32) {
        __m512bh w[4];
        for (int j = 0; j < cols; j++) {
            const uint16_t *row = wp + (n + j) * a->K + k;
            w[j] = (__m512bh)_mm512_loadu_si512(row);
            if (m == 0) _mm_prefetch((const char *)(row + 512), _MM_HINT_T0);
        }
        for (int i = 0; i < rows; i++) {
            __m512bh x = (__m512bh)_mm512_loadu_si512(xp + (m + i) * a->ldx + k);
            for (int j = 0; j < cols; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, w[j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) finish(a, m + i, n + j, _mm512_reduce_add_ps(acc[i][j]));
}
#endif

INLINE void block(const struct linear *a, long m, long n, int rows, int cols) {
#ifdef HAVE_DPBF16
    if (a->dtype == BF16 && a->level >= DPBF16) return dots_bf16(a, m, n, rows, cols);
#endif
    if (a->dtype == BF16)
        dots(a, m, n, rows, cols, BF16);
    else
        dots(a, m, n, rows, cols, F32);
}

enum { STRIPE = 32 };               // output columns a task owns
enum { STACK_ELEMENTS = 1 << 17 };  // cpu.py knows this number

static void linear_stripe(const void *args, long task) {
    const struct linear *a = args;
    for (long n = task * STRIPE; n < MIN(a->N, (task + 1) * STRIPE);) {
        int four = a->N - n >= 4;
        for (long m = 0; m < a->M;) {
            if (a->M - m >= 4 && four)
                block(a, m, n, 4, 4), m += 4;
            else if (a->M - m >= 2 && four)
                block(a, m, n, 2, 4), m += 2;
            else if (four)
                block(a, m, n, 1, 4), m += 1;
            else
                block(a, m, n, 1, 1), m += 1;
        }
        n += four ? 4 : 1;
    }
}

#ifdef HAVE_AMX
// x rows 16t..16t+15 as the right-hand tiles of tdpbf16: per 32 of K, words [pair of k][row], 1 KiB a tile.
static void linear_pack(const void *args, long t) {
    const struct linear *a = args;
    const uint16_t *x = (const uint16_t *)a->x + 16 * t * a->ldx;
    uint16_t *out = a->packed + 16 * t * a->K;
    int rows = (int)MIN(16, a->M - 16 * t);
    for (long k = 0; k < a->K; k += 32, out += 512) {
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = i < rows ? _mm512_loadu_si512(x + i * a->ldx + k) : _mm512_setzero_si512();
        transpose(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + 32 * i, r[i]);
    }
}

// sums[16 n][16 m] to out[m][n..n+15].
INLINE void linear_store(const struct linear *a, const float *sums, long m, long n) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + 16 * i);
    transpose(r);
    __m512 bias = a->bias ? (__m512)load(a->bias, n, BF16) : _mm512_setzero_ps();
    int rows = (int)MIN(16, a->M - m);
    for (int i = 0; i < rows; i++) {
        __m256bh h = _mm512_cvtneps_pbh(_mm512_add_ps((__m512)r[i], bias));
        _mm256_storeu_si256((__m256i *)((uint16_t *)a->out + (m + i) * a->N + n), (__m256i)h);
    }
}

// 32 output columns: weights are the left-hand tiles just as they lie in memory.
static void linear_tiles(const void *args, long task) {
    const struct linear *a = args;
    long K = a->K, n = MIN(task * 32, a->N - 32);  // the last stripe may redo some of the one before
    const uint16_t *w = (const uint16_t *)a->w + n * K;
    float sums[4][256] __attribute__((aligned(64)));
    struct tiles saved;
    tiles_begin(&saved);
    for (long m = 0; m < a->M; m += 32) {
        const uint16_t *x0 = a->packed + m * K, *x1 = x0 + 16 * K;
        int two = m + 16 < a->M;
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (long k = 0; k < K; k += 32) {
            _tile_loadd(4, w + k, K * 2);
            _tile_loadd(5, w + k + 16 * K, K * 2);
            _tile_loadd(6, x0 + k * 16, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (two) {
                _tile_loadd(7, x1 + k * 16, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            if (m == 0) {  // the weights come from memory: 16 lines ahead, then on into the next stripe's rows
                long ahead = k + 512 < K ? k + 512 : k + 512 + 31 * K;
                for (int i = 0; i < 32; i++) _mm_prefetch((const char *)(w + ahead + i * K), _MM_HINT_T1);
            }
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        if (two) {
            _tile_stored(2, sums[2], 64);
            _tile_stored(3, sums[3], 64);
        }
        FENCE();
        linear_store(a, sums[0], m, n), linear_store(a, sums[1], m, n + 16);
        if (two) {
            linear_store(a, sums[2], m + 16, n), linear_store(a, sums[3], m + 16, n + 16);
        }
    }
    tiles_end(&saved);
}
#endif

static void linear(const struct linear *a, int threads) {
    if (a->N * a->K * MAX(a->M, 8) < SMALL) threads = 1;
#ifdef HAVE_AMX
    if (a->packed) {
        each((a->M + 15) / 16, a->M * a->K < SMALL ? 1 : threads, linear_pack, a);
        each((a->N + 31) / 32, threads, linear_tiles, a);
        return;
    }
#endif
    each((a->N + STRIPE - 1) / STRIPE, threads, linear_stripe, a);
}

// Small inputs are packed on the stack: asking torch for memory costs as much as the packing.
static __attribute__((noinline)) void linear_on_stack(struct linear a, int threads) {
    uint16_t packed[STACK_ELEMENTS] __attribute__((aligned(64)));
    a.packed = packed;
    linear(&a, threads);
}

// Level AMX wants bf16, N >= 32, K a multiple of 32, and `packed` with room for (M rounded up to 16) * K elements; it
// may be null where those are at most STACK_ELEMENTS.
void drift_linear(const void *x, const void *w, const void *bias, void *out, void *packed, long M, long N, long K,
                  long ldx, int dtype, int level, int threads) {
    struct linear a = {x, w, bias, out, packed, M, N, K, ldx, dtype, level};
    if (level == AMX && !packed)
        linear_on_stack(a, threads);
    else
        linear(&a, threads);
}

// ------------------------------------------------------------------------------------------------------- attention
// One task is one sequence, one KV head and a run of query rows. A row is (query token, head of the group), numbered
// token * group + head, so that grouped queries share every key and value that is loaded.

enum { KV = 64 };  // tokens of KV taken together: one rescaling of the sums per row
static const float HIDDEN = -1e30f;  // finite: a row that has seen nothing yet must not turn into NaN

struct attend {
    const void *q, *k_pages, *v_pages;
    void *out;
    const int32_t *starts, *contexts, *table;
    long T, B, Hq, Hk, D, ldq, max_pages, num_pages, page_tokens, runs, rows, window;
    float scale;
    int dtype;
    long *bad_page;
};

struct span {  // what one task works on
    long b, head, context, first_position, r0, r1, lo, hi;
};

// Decode a task number. Returns 0 if the sequence has fewer runs of rows than the longest one.
INLINE int span_of(const struct attend *a, long task, struct span *s) {
    long group = a->Hq / a->Hk, run = task % a->runs;
    s->head = task / a->runs % a->Hk;
    s->b = task / a->runs / a->Hk;
    long queries = a->starts[s->b + 1] - a->starts[s->b];
    s->r0 = run * a->rows;
    s->r1 = MIN(s->r0 + a->rows, queries * group);
    if (s->r0 >= s->r1) return 0;
    s->context = a->contexts[s->b];
    s->first_position = s->context - queries;
    s->lo = a->window ? MAX(0, s->first_position + s->r0 / group - a->window + 1) : 0;
    s->hi = s->first_position + (s->r1 - 1) / group + 1;
    return 1;
}

INLINE const char *query_row(const struct attend *a, const struct span *s, long r, int size) {
    long group = a->Hq / a->Hk, token = a->starts[s->b] + r / group;
    return (const char *)a->q + (token * a->ldq + (s->head * group + r % group) * a->D) * size;
}

INLINE char *out_row(const struct attend *a, const struct span *s, long r, int size) {
    long group = a->Hq / a->Hk, token = a->starts[s->b] + r / group;
    return (char *)a->out + ((token * a->Hq) + s->head * group + r % group) * a->D * size;
}

// Where tokens t0..t0+n-1 lie in k_pages and v_pages, in elements. Returns 0 on a page that does not exist.
INLINE int offsets(const struct attend *a, const struct span *s, long t0, int n, long at[KV]) {
    long page = t0 / a->page_tokens, in_page = t0 % a->page_tokens, row = a->Hk * a->D;
    for (int i = 0; i < n; page++, in_page = 0) {
        long id = a->table[s->b * a->max_pages + page];
        if (id < 0 || id >= a->num_pages) {
            __atomic_store_n(a->bad_page, id, __ATOMIC_RELAXED);
            return 0;
        }
        for (; in_page < a->page_tokens && i < n; i++, in_page++)
            at[i] = (id * a->page_tokens + in_page) * row + s->head * a->D;
    }
    return 1;
}

// Ask for the block of KV at t0 while the one before it is worked on: pages lie anywhere, hardware cannot guess them.
INLINE void fetch_ahead(const struct attend *a, const struct span *s, long t0, long size) {
    long at[KV];
    int n = (int)MIN(KV, s->hi - t0);
    if (n <= 0 || !offsets(a, s, t0, n, at)) return;
    for (int i = 0; i < n; i++)
        for (long byte = 0; byte < a->D * size; byte += 64) {
            __builtin_prefetch((const char *)a->k_pages + at[i] * size + byte, 0, 2);
            __builtin_prefetch((const char *)a->v_pages + at[i] * size + byte, 0, 2);
        }
}

// Any dtype, any instructions: up to LANES rows share a block of KV, four at a time share a load.
enum { LANES = 16 };

struct plain_scratch {
    float q[LANES][256], sums[LANES][256], p[LANES][KV], most[LANES], total[LANES];
    long at[KV];
    float k[KV * 256], v[KV * 256];
};

// p[row][token] for four rows and four tokens; those past `n` are read from the last one and masked afterwards.
INLINE void plain_scores(const struct attend *a, struct plain_scratch *w, const void *keys, int row, int n, int dtype) {
    for (int t = 0; t < n; t += 4) {
        vec acc[4][4] = {0};
        for (long d = 0; d < a->D; d += 16) {
            vec k[4];
            for (int j = 0; j < 4; j++) k[j] = load(keys, w->at[MIN(t + j, n - 1)] + d, dtype);
            for (int i = 0; i < 4; i++) {
                vec q = load(w->q[row + i], d, F32);
                for (int j = 0; j < 4; j++) acc[i][j] += q * k[j];
            }
        }
        vec scores = sums16(&acc[0][0]) * a->scale;
        for (int i = 0; i < 4; i++) memcpy(&w->p[row + i][t], (const float *)&scores + 4 * i, 4 * sizeof(float));
    }
}

INLINE void plain_sums(const struct attend *a, struct plain_scratch *w, const void *values, int row, int n, int dtype) {
    for (long d = 0; d < a->D; d += 16) {
        vec acc[4];
        for (int i = 0; i < 4; i++) acc[i] = load(w->sums[row + i], d, F32);
        for (int t = 0; t < n; t++) {
            vec v = load(values, w->at[t] + d, dtype);
            for (int i = 0; i < 4; i++) acc[i] += w->p[row + i][t] * v;
        }
        for (int i = 0; i < 4; i++) store(w->sums[row + i], d, acc[i], F32);
    }
}

// Scores to weights for the tokens t0.. that a row at `position` sees; the others get 0.
static void plain_softmax(const struct attend *a, struct plain_scratch *w, int row, long position, long t0, int n) {
    float *p = w->p[row];
    int from = a->window ? (int)MIN(MAX(position - a->window + 1 - t0, 0), KV) : 0, to = (int)MIN(n, position + 1 - t0);
    if (from >= to) {
        memset(p, 0, sizeof w->p[row]);
        return;
    }
    for (int i = 0; i < from; i++) p[i] = HIDDEN;
    for (int i = to; i < KV; i++) p[i] = HIDDEN;
    vec peak = splat(w->most[row]), mass = splat(0);
    for (int i = 0; i < KV; i += 16) peak = vmax(peak, load(p, i, F32));
    float now = largest(peak), fade = expf(w->most[row] - now);
    for (int i = 0; i < KV; i += 16) {
        vec e = vexp(load(p, i, F32) - now);
        mass += e;
        store(p, i, e, F32);
    }
    w->total[row] = w->total[row] * fade + sum(mass), w->most[row] = now;
    if (fade != 1)
        for (long d = 0; d < a->D; d += 16) store(w->sums[row], d, load(w->sums[row], d, F32) * fade, F32);
}

// Scores, weights and sums of four rows over the tokens t0..
INLINE void plain_step(const struct attend *a, const struct span *s, struct plain_scratch *w, const void *keys,
                       const void *values, int row, long t0, int n, int dtype) {
    plain_scores(a, w, keys, row, n, dtype);
    for (int i = row; i < row + 4; i++)
        plain_softmax(a, w, i, s->first_position + MIN(s->r0 + i, s->r1 - 1) / (a->Hq / a->Hk), t0, n);
    plain_sums(a, w, values, row, n, dtype);
}

// A block of KV that many rows share, as fp32 without gaps: heads that lie 4 KiB apart would fight for cache lines.
INLINE void plain_pack(const struct attend *a, struct plain_scratch *w, int n, int dtype) {
    for (int t = 0; t < n; t++) {
        for (long d = 0; d < a->D; d += 16) {
            store(w->k, t * a->D + d, load(a->k_pages, w->at[t] + d, dtype), F32);
            store(w->v, t * a->D + d, load(a->v_pages, w->at[t] + d, dtype), F32);
        }
        w->at[t] = t * a->D;
    }
}

INLINE void plain_task(const struct attend *a, const struct span *s, struct plain_scratch *w, int dtype) {
    long size = dtype == BF16 ? 2 : 4;
    int rows = (int)(s->r1 - s->r0), fours = (rows + 3) / 4 * 4;  // rows that fill up the last four repeat the last
    for (int i = 0; i < fours; i++) {
        const char *q = query_row(a, s, s->r0 + MIN(i, rows - 1), (int)size);
        for (long d = 0; d < a->D; d += 16) {
            store(w->q[i], d, load(q, d, dtype), F32);
            store(w->sums[i], d, splat(0), F32);
        }
        w->most[i] = HIDDEN, w->total[i] = 0;
    }
    for (long t0 = s->lo; t0 < s->hi; t0 += KV) {
        int n = (int)MIN(KV, s->hi - t0);
        if (!offsets(a, s, t0, n, w->at)) return;
        fetch_ahead(a, s, t0 + KV, size);
        if (fours == 4) {
            plain_step(a, s, w, a->k_pages, a->v_pages, 0, t0, n, dtype);
            continue;
        }
        plain_pack(a, w, n, dtype);
        for (int row = 0; row < fours; row += 4) plain_step(a, s, w, w->k, w->v, row, t0, n, F32);
    }
    for (int i = 0; i < rows; i++)
        for (long d = 0; d < a->D; d += 16)
            store(out_row(a, s, s->r0 + i, (int)size), d, load(w->sums[i], d, F32) / w->total[i], dtype);
}

static __attribute__((noinline)) void attend_plain(const struct attend *a, const struct span *s) {
    struct plain_scratch w;
    if (a->dtype == BF16)
        plain_task(a, s, &w, BF16);
    else
        plain_task(a, s, &w, F32);
}

static void attend_rows(const void *args, long task) {
    struct span s;
    if (span_of(args, task, &s)) attend_plain(args, &s);
}

#ifdef HAVE_AMX
// Everything is laid out with the query row as the lane, so softmax needs no sums across lanes:
//   scores[token][row] = K[token][d] Q^T[d][row]      K tiles as they lie, copied to clear the tail
//   sums[d][row] += V^T[d][token] P[token][row]       V transposed once per KV block, for all rows of the task
enum { ROWS = 128 };

struct amx_scratch {
    uint16_t q[ROWS / LANES][8][512];  // per 32 dimensions: words [pair of d][row]
    uint16_t k[KV][256];
    uint16_t v[16][2][512];  // per 16 dimensions, per 32 tokens: [d][token]
    float scores[KV][LANES];
    uint16_t p[2][512];  // per 32 tokens: words [pair of tokens][row]
    float sums[ROWS / LANES][16][16][LANES];
    float most[ROWS / LANES][LANES], total[ROWS / LANES][LANES];
    long at[KV];
} __attribute__((aligned(64)));

INLINE __m512i load_tail(const uint16_t *p, long left) {  // 32 halves, zero from `left` on
    return left >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << left) - 1, p);
}

static void amx_pack_q(const struct attend *a, const struct span *s, struct amx_scratch *w) {
    for (long r = s->r0; r < s->r1; r += LANES) {
        int n = (int)MIN(LANES, s->r1 - r);
        for (long d = 0; d < a->D; d += 32) {
            __m512i x[16];
            for (int i = 0; i < 16; i++)
                x[i] = i < n ? load_tail((const uint16_t *)query_row(a, s, r + i, 2) + d, a->D - d)
                             : _mm512_setzero_si512();
            transpose(x);
            for (int i = 0; i < 16; i++) _mm512_store_si512(&w->q[(r - s->r0) / LANES][d / 32][32 * i], x[i]);
        }
    }
}

static void amx_pack_kv(const struct attend *a, struct amx_scratch *w, int n) {
    const uint16_t *k = a->k_pages, *v = a->v_pages;
    int tokens = (n + 31) / 32 * 32;
    for (int i = 0; i < tokens; i++)
        for (long d = 0; d < a->D; d += 32)
            _mm512_store_si512(&w->k[i][d], i < n ? load_tail(k + w->at[i] + d, a->D - d) : _mm512_setzero_si512());
    for (int t = 0; t < tokens; t += 32) {
        for (long d = 0; d < a->D; d += 16) {
            __m512i x[16];  // words [pair of tokens][d], then [d][pair of tokens]
            for (int i = 0; i < 16; i++) {
                int t0 = t + 2 * i;
                __m256i zero = _mm256_setzero_si256();
                __m256i even = t0 < n ? _mm256_loadu_si256((const __m256i *)(v + w->at[t0] + d)) : zero;
                __m256i odd = t0 + 1 < n ? _mm256_loadu_si256((const __m256i *)(v + w->at[t0 + 1] + d)) : zero;
                x[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
            }
            transpose(x);
            for (int i = 0; i < 16; i++) _mm512_store_si512(&w->v[d / 16][t / 32][32 * i], x[i]);
        }
    }
}

static void amx_scores(const struct attend *a, struct amx_scratch *w, long lane, int n) {
    FENCE();
    for (int t = 0; t < n; t += 32) {
        _tile_zero(0);
        _tile_zero(1);
        for (long d = 0; d < a->D; d += 32) {
            _tile_loadd(6, w->q[lane][d / 32], 64);
            _tile_loadd(4, &w->k[t][d], sizeof w->k[0]);
            _tile_loadd(5, &w->k[t + 16][d], sizeof w->k[0]);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, w->scores[t], 64);
        _tile_stored(1, w->scores[t + 16], 64);
    }
    FENCE();
}

static void amx_sums(const struct attend *a, struct amx_scratch *w, long lane, int n) {
    FENCE();
    for (long d = 0; d < a->D; d += 16) {
        float *sums = w->sums[lane][d / 16][0];
        _tile_loadd(0, sums, 64);
        for (int t = 0; t < n; t += 32) {
            _tile_loadd(4, w->v[d / 16][t / 32], 64);
            _tile_loadd(6, w->p[t / 32], 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, sums, 64);
    }
    FENCE();
}

// Scores of tokens t0.. against one lane group of rows; folds them into its maximum, mass and sums.
static void amx_step(const struct attend *a, const struct span *s, struct amx_scratch *w, long lane, long t0, int n) {
    long group = a->Hq / a->Hk, r = s->r0 + lane * LANES, last = MIN(r + LANES, s->r1) - 1;
    int32_t at[16];
    for (int i = 0; i < 16; i++) at[i] = (int32_t)(s->first_position + MIN(r + i, last) / group - t0);
    int newest = at[15], oldest = a->window ? (int)MAX(at[0] - a->window + 1, -1) : -1;
    if (newest < 0 || oldest >= n) return;
    amx_scores(a, w, lane, n);
    int edge = at[0] < n - 1 || (a->window && at[15] - a->window + 1 > 0);
    int tokens = (n + 31) / 32 * 32;
    ivec position;
    memcpy(&position, at, sizeof position);
    vec most = load(w->most[lane], 0, F32), peak = most, mass = splat(0);
    for (int i = 0; i < tokens; i++) {
        vec x = load(w->scores[i], 0, F32) * a->scale;
        if (edge) {
            ivec seen = position >= i;
            if (a->window) seen &= position - (int32_t)a->window < i;
            x = choose(seen, x, splat(HIDDEN));
        }
        if (i >= n) x = splat(HIDDEN);
        peak = vmax(peak, x);
        store(w->scores[i], 0, x, F32);
    }
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int i = 0; i < tokens; i += 2) {
        vec even = vexp(load(w->scores[i], 0, F32) - peak), odd = vexp(load(w->scores[i + 1], 0, F32) - peak);
        mass += even + odd;
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        _mm512_store_si512(&w->p[i / 32][i % 32 * 16], _mm512_permutexvar_epi16(zip, both));
    }
    vec fade = vexp(most - peak);
    store(w->total[lane], 0, load(w->total[lane], 0, F32) * fade + mass, F32);
    store(w->most[lane], 0, peak, F32);
    if (_mm512_cmp_ps_mask((__m512)fade, _mm512_set1_ps(1), _CMP_NEQ_UQ))
        for (long d = 0; d < a->D; d++) {
            float *x = w->sums[lane][d / 16][d % 16];
            store(x, 0, load(x, 0, F32) * fade, F32);
        }
    amx_sums(a, w, lane, n);
}

static void amx_finish(const struct attend *a, const struct span *s, struct amx_scratch *w) {
    for (long r = s->r0; r < s->r1; r += LANES) {
        long lane = (r - s->r0) / LANES;
        int n = (int)MIN(LANES, s->r1 - r);
        vec share = 1.0f / load(w->total[lane], 0, F32);
        for (long d = 0; d < a->D; d += 16) {
            __m512i x[16];
            for (int i = 0; i < 16; i++) x[i] = (__m512i)(load(w->sums[lane][d / 16][i], 0, F32) * share);
            transpose(x);
            for (int i = 0; i < n; i++) store(out_row(a, s, r + i, 2), d, (vec)x[i], BF16);
        }
    }
}

static __attribute__((noinline)) void attend_amx(const struct attend *a, const struct span *s) {
    struct amx_scratch w;
    struct tiles saved;
    long lanes = (s->r1 - s->r0 + LANES - 1) / LANES;
    amx_pack_q(a, s, &w);
    for (long lane = 0; lane < lanes; lane++) {
        store(w.most[lane], 0, splat(HIDDEN), F32);
        store(w.total[lane], 0, splat(0), F32);
        memset(w.sums[lane], 0, (size_t)a->D * LANES * sizeof(float));
    }
    tiles_begin(&saved);
    for (long t0 = s->lo; t0 < s->hi; t0 += KV) {
        int n = (int)MIN(KV, s->hi - t0);
        if (!offsets(a, s, t0, n, w.at)) break;
        fetch_ahead(a, s, t0 + KV, 2);
        amx_pack_kv(a, &w, n);
        for (long lane = 0; lane < lanes; lane++) amx_step(a, s, &w, lane, t0, n);
    }
    tiles_end(&saved);
    amx_finish(a, s, &w);
}

// Up to four rows (decode of small groups) would leave most of a tile idle: there plain vectors are 1.25x faster.
static void attend_tiles(const void *args, long task) {
    struct span s;
    if (!span_of(args, task, &s)) return;
    if (s.r1 - s.r0 <= 4)
        attend_plain(args, &s);
    else
        attend_amx(args, &s);
}
#endif

// What the kernel takes on trust below, checked once: the values of `inputs` fit together. Returns a code for cpu.py.
static int attend_fault(const struct attend *a, long max_query, long max_context) {
    if (a->starts[0] != 0 || a->starts[a->B] != a->T) return 1;
    for (long b = 0; b < a->B; b++) {
        long queries = a->starts[b + 1] - a->starts[b];
        if (queries < 1 || queries > max_query) return 1;
        if (a->contexts[b] < queries || a->contexts[b] > max_context) return 2;
        if (a->contexts[b] > a->max_pages * a->page_tokens) return 3;
    }
    return 0;
}

// Returns 0, or which part of the inputs is wrong: 1 query_starts, 2 context_lens, 3 page_table's width, 4 a page in it.
int drift_attend(const void *q, const void *k_pages, const void *v_pages, void *out, const int32_t *starts,
                 const int32_t *contexts, const int32_t *table, long T, long B, long Hq, long Hk, long D, long ldq,
                 long max_pages, long num_pages, long page_tokens, long max_query, long max_context, long window,
                 float scale, int dtype, int level, int threads) {
    void (*work)(const void *, long) = attend_rows;
    long rows = LANES, bad = INT64_MIN;
#ifdef HAVE_AMX
    if (level == AMX && dtype == BF16) work = attend_tiles, rows = ROWS;
#else
    (void)level;
#endif
    struct attend a = {q, k_pages, v_pages, out, starts, contexts, table, T, B, Hq, Hk, D, ldq, max_pages, num_pages,
                       page_tokens, (max_query * (Hq / Hk) + rows - 1) / rows, rows, window, scale, dtype, &bad};
    int fault = attend_fault(&a, max_query, max_context);
    if (fault) return fault;
    if (T * Hq * D * max_context < SMALL) threads = 1;
    each(B * Hk * a.runs, threads, work, &a);
    return bad == INT64_MIN ? 0 : 4;
}

// ------------------------------------------------------------------------------------- norms, activation, rotary, KV

struct rows {
    const void *x, *residual, *weight;
    void *out, *total;
    long rows, D, ldx, ldr;
    float eps;
    int dtype;
};

enum { ROWS_A_TASK = 8 };

INLINE void norm_row(const struct rows *a, long r, int dtype) {
    vec squares = splat(0);
    const void *x = a->residual ? a->total : a->x;
    long at = r * (a->residual ? a->D : a->ldx), out = r * a->D;
    for (long d = 0; d < a->D; d += 16) {
        vec v = load(a->x, r * a->ldx + d, dtype);
        if (a->residual) {
            v = rounded(v + load(a->residual, r * a->ldr + d, dtype), dtype);
            store(a->total, out + d, v, dtype);
        }
        squares += v * v;
    }
    float scale = 1.0f / sqrtf(sum(squares) / (float)a->D + a->eps);
    for (long d = 0; d < a->D; d += 16) {
        vec v = rounded(load(x, at + d, dtype) * scale, dtype);
        store(a->out, out + d, v * load(a->weight, d, dtype), dtype);
    }
}

INLINE void gate_row(const struct rows *a, long r, int dtype) {
    for (long d = 0; d < a->D; d += 16) {
        vec gate = load(a->x, r * a->ldx + d, dtype), up = load(a->x, r * a->ldx + a->D + d, dtype);
        vec silu = gate / (1.0f + vexp(vmin(-gate, splat(88.0f))));
        silu = choose(gate < -88.0f, splat(0), silu);
        store(a->out, r * a->D + d, rounded(silu, dtype) * up, dtype);
    }
}

static void norm_rows(const void *args, long task) {
    const struct rows *a = args;
    for (long r = task * ROWS_A_TASK; r < MIN(a->rows, (task + 1) * ROWS_A_TASK); r++) {
        if (a->dtype == BF16)
            norm_row(a, r, BF16);
        else
            norm_row(a, r, F32);
    }
}

static void gate_rows(const void *args, long task) {
    const struct rows *a = args;
    for (long r = task * ROWS_A_TASK; r < MIN(a->rows, (task + 1) * ROWS_A_TASK); r++) {
        if (a->dtype == BF16)
            gate_row(a, r, BF16);
        else
            gate_row(a, r, F32);
    }
}

INLINE void each_rows(long rows, long width, int threads, void (*work)(const void *, long), const void *args) {
    each((rows + ROWS_A_TASK - 1) / ROWS_A_TASK, rows * width < SMALL / 4 ? 1 : threads, work, args);
}

// residual and total may be null together.
void drift_rms_norm(const void *x, const void *residual, const void *weight, void *out, void *total, long rows, long D,
                    long ldx, long ldr, float eps, int dtype, int threads) {
    struct rows a = {x, residual, weight, out, total, rows, D, ldx, ldr, eps, dtype};
    each_rows(rows, D, threads, norm_rows, &a);
}

void drift_silu_and_mul(const void *gate_up, void *out, long rows, long F, long ldx, int dtype, int threads) {
    struct rows a = {.x = gate_up, .out = out, .rows = rows, .D = F, .ldx = ldx, .dtype = dtype};
    each_rows(rows, F, threads, gate_rows, &a);
}

struct rotary {
    const void *q, *k, *cos, *sin;
    void *q_out, *k_out;
    long T, Hq, Hk, D, ldq, ldk, ldc, lds;
    int dtype, angles;
};

// Halves of fewer than a multiple of 16 overlap in their last step: it writes the same again.
INLINE void turn(const struct rotary *a, long t, const void *x, long at, void *out, long to, int dtype, int angles) {
    long half = a->D / 2;
    for (long i = 0;;) {
        vec low = load(x, at + i, dtype), high = load(x, at + half + i, dtype);
        vec c0 = rounded(load(a->cos, t * a->ldc + i, angles), dtype);
        vec c1 = rounded(load(a->cos, t * a->ldc + half + i, angles), dtype);
        vec s0 = rounded(load(a->sin, t * a->lds + i, angles), dtype);
        vec s1 = rounded(load(a->sin, t * a->lds + half + i, angles), dtype);
        store(out, to + i, rounded(low * c0, dtype) - rounded(high * s0, dtype), dtype);
        store(out, to + half + i, rounded(high * c1, dtype) + rounded(low * s1, dtype), dtype);
        if (i + 16 >= half) return;
        i = MIN(i + 16, half - 16);
    }
}

INLINE void turn_token(const struct rotary *a, long t, int dtype, int angles) {
    for (long h = 0; h < a->Hq; h++)
        turn(a, t, a->q, t * a->ldq + h * a->D, a->q_out, (t * a->Hq + h) * a->D, dtype, angles);
    for (long h = 0; h < a->Hk; h++)
        turn(a, t, a->k, t * a->ldk + h * a->D, a->k_out, (t * a->Hk + h) * a->D, dtype, angles);
}

static void turn_tokens(const void *args, long task) {
    const struct rotary *a = args;
    for (long t = task * ROWS_A_TASK; t < MIN(a->T, (task + 1) * ROWS_A_TASK); t++) {
        if (a->dtype == BF16 && a->angles == BF16)
            turn_token(a, t, BF16, BF16);
        else if (a->dtype == BF16)
            turn_token(a, t, BF16, F32);
        else
            turn_token(a, t, F32, F32);
    }
}

void drift_rotary(const void *q, const void *k, const void *cos, const void *sin, void *q_out, void *k_out, long T,
                  long Hq, long Hk, long D, long ldq, long ldk, long ldc, long lds, int dtype, int angles,
                  int threads) {
    struct rotary a = {q, k, cos, sin, q_out, k_out, T, Hq, Hk, D, ldq, ldk, ldc, lds, dtype, angles};
    each_rows(T, (Hq + Hk) * D, threads, turn_tokens, &a);
}

// Rows of `bytes` to their slots. Returns the index of the first slot outside 0..capacity-1, with nothing written, or -1.
long drift_write_kv(const char *k, const char *v, char *k_pages, char *v_pages, const int64_t *slots, long T,
                    long bytes, long k_step, long v_step, long capacity) {
    for (long t = 0; t < T; t++)
        if (slots[t] < 0 || slots[t] >= capacity) return t;
    for (long t = 0; t < T; t++) {
        memcpy(k_pages + slots[t] * bytes, k + t * k_step, (size_t)bytes);
        memcpy(v_pages + slots[t] * bytes, v + t * v_step, (size_t)bytes);
    }
    return -1;
}

// ------------------------------------------------------------------------------------------------- lists of decode work
// What drift_core.cuda.decode_work.cut_decode computes, for a host that has microseconds between two steps of a GPU.
// bounds[programs + 1]; items and merges of 8 words each, last[heads * rows]. Returns the items; *merged: the merges.

long drift_cut_decode(const int64_t *context, long rows, long heads, long keys, long least, long programs, long window,
                      int32_t *bounds, int32_t *items, int32_t *merges, int64_t *last, int64_t *merged) {
    long parts = programs / heads, total = 0;
    for (long b = 0; b < rows; b++) {
        long first = window > 0 && context[b] > window ? (context[b] - window) / keys * keys : 0;
        total += (context[b] - first + keys - 1) / keys;
    }
    long busy = MIN(parts, (total * keys + least - 1) / least), part = 0, done = 0, n = 0, slots = 0, pieces_of = 0;
    for (long b = 0; b < rows; b++) {
        long first = window > 0 && context[b] > window ? (context[b] - window) / keys * keys : 0;
        long length = (context[b] - first + keys - 1) / keys, tile = 0, begun = n;
        while (tile < length) {
            while (part < busy && part * total / busy <= done) bounds[part++] = (int32_t)n;
            long mark = part < busy ? part * total / busy : total;
            long stop = MIN(length, tile + mark - done);
            int32_t *item = items + 8 * n++;
            memset(item, 0, 8 * sizeof *item);
            item[0] = (int32_t)b;
            item[3] = (int32_t)(first + tile * keys);
            item[4] = (int32_t)MIN(context[b], first + stop * keys);
            item[5] = -1;
            done += stop - tile;
            tile = stop;
        }
        last[b] = n - 1;
        if (n - begun > 1) {
            int32_t *merge = merges + 8 * pieces_of++;
            memset(merge, 0, 8 * sizeof *merge);
            merge[0] = (int32_t)b;
            merge[3] = (int32_t)slots;
            merge[4] = (int32_t)(n - begun);
            for (long i = begun; i < n; i++) items[8 * i + 5] = (int32_t)slots++;
        }
    }
    while (part < parts) bounds[part++] = (int32_t)n;
    for (long h = 1; h < heads; h++) {
        for (long p = 0; p < parts; p++) bounds[h * parts + p] = bounds[p] + (int32_t)(h * n);
        for (long b = 0; b < rows; b++) last[h * rows + b] = last[b] + h * n;
        memcpy(items + 8 * h * n, items, (size_t)(8 * n) * sizeof *items);
        memcpy(merges + 8 * h * pieces_of, merges, (size_t)(8 * pieces_of) * sizeof *merges);
        for (long i = h * n; i < (h + 1) * n; i++) {
            items[8 * i + 1] = (int32_t)h;
            if (items[8 * i + 5] >= 0) items[8 * i + 5] += (int32_t)(h * slots);
        }
        for (long i = h * pieces_of; i < (h + 1) * pieces_of; i++) {
            merges[8 * i + 1] = (int32_t)h;
            merges[8 * i + 3] += (int32_t)(h * slots);
        }
    }
    for (long p = heads * parts; p <= programs; p++) bounds[p] = (int32_t)(heads * n);
    *merged = heads * pieces_of;
    return heads * n;
}
