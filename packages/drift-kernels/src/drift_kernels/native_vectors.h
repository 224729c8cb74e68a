// What the kernels in native.c stand on: tasks run by a team of threads, sixteen floats at a time, AMX tiles.

#define _GNU_SOURCE
#pragma GCC diagnostic ignored "-Wpsabi"
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_DPBF16 1
#endif
#if defined(HAVE_DPBF16) && defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
enum { F32 = 0, BF16 = 1 };
enum { SMALL = 1 << 21 };  // multiplications below which waking a worker (10-20 us) does not pay
enum { PORTABLE = 0, DPBF16 = 1, AMX = 2 };

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t half __attribute__((vector_size(32)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

// ---------------------------------------------------------------------------------------------------------- teams

typedef void (*region)(void *);
static void (*team_run)(region, void *, unsigned, unsigned);  // GOMP_parallel of the libgomp that torch loaded

struct job {
    void (*work)(const void *args, long task);
    const void *args;
    long tasks, next;
};

static void member(void *p) {
    struct job *job = p;
    for (long t; (t = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->tasks;) job->work(job->args, t);
}

// Run tasks 0..tasks-1, in any order, on the calling thread's team. One thread never touches the team: a smaller
// region would make libgomp end the workers that it leaves out.
static void each(long tasks, int threads, void (*work)(const void *, long), const void *args) {
    struct job job = {work, args, tasks, 0};
    if (threads > 1 && tasks > 1 && team_run)
        team_run(member, &job, (unsigned)threads, 0);
    else
        member(&job);
}

// Returns the highest instruction level this build and machine have: PORTABLE, DPBF16 or AMX. Calls below take the
// level to use, at most that. gomp_parallel may be null: then every call stays on its thread.
int drift_init(void *gomp_parallel) {
    team_run = gomp_parallel;
#ifdef HAVE_AMX
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0) return AMX;
#endif
#ifdef HAVE_DPBF16
    return DPBF16;
#endif
    return PORTABLE;
}

// --------------------------------------------------------------------------------------------- sixteen lanes at once

INLINE vec splat(float x) { return (vec){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE vec widen(half h) {
#ifdef __AVX512F__
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
    return (vec)(__builtin_convertvector(h, uvec) << 16);
#endif
}

// fp32 to bf16 as torch does: to nearest, ties to even; NaN stays NaN.
INLINE half narrow(vec x) {
#ifdef HAVE_DPBF16
    return (half)_mm512_cvtneps_pbh((__m512)x);
#endif
    uvec u = (uvec)x;
    uvec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    uvec nan = (uvec)(x != x);
    return __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), half);
}

INLINE vec load(const void *p, long i, int dtype) {
    if (dtype == BF16) {
        half h;
        memcpy(&h, (const uint16_t *)p + i, sizeof h);
        return widen(h);
    }
    vec v;
    memcpy(&v, (const float *)p + i, sizeof v);
    return v;
}

INLINE void store(void *p, long i, vec v, int dtype) {
    if (dtype == BF16) {
        half h = narrow(v);
        memcpy((uint16_t *)p + i, &h, sizeof h);
    } else {
        memcpy((float *)p + i, &v, sizeof v);
    }
}

// What a torch op of this dtype would hand to the next one.
INLINE vec rounded(vec v, int dtype) { return dtype == BF16 ? widen(narrow(v)) : v; }

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

INLINE vec vmax(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE vec vmin(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return choose(a < b, a, b);
#endif
}

INLINE float sum(vec v) {
    vec8 a[2];
    memcpy(a, &v, sizeof a);
    a[0] += a[1];
    vec4 b[2];
    memcpy(b, a, sizeof b);
    b[0] += b[1];
    return b[0][0] + b[0][1] + (b[0][2] + b[0][3]);
}

// The sums of sixteen vectors, as a vector.
INLINE vec sums16(const vec *x) {
#ifdef __AVX512F__
    __m512 t[16];
    for (int i = 0; i < 16; i++) t[i] = (__m512)x[i];
    for (int i = 0; i < 8; i++)
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_ps(t[2 * i], t[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
        t[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    for (int n = 2; n; n /= 2)
        for (int i = 0; i < n; i++)
            t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd));
    return (vec)t[0];
#else
    vec s;
    for (int i = 0; i < 16; i++) s[i] = sum(x[i]);
    return s;
#endif
}

INLINE float largest(vec v) {
    float s[16];
    memcpy(s, &v, sizeof s);
    for (int w = 8; w; w /= 2)
        for (int i = 0; i < w; i++) s[i] = MAX(s[i], s[i + w]);
    return s[0];
}

// e^x to about 2e-7 relative for x <= 88; 0 below -87. Cephes' expf polynomial after x = n ln 2 + r.
INLINE vec vexp(vec x) {
    ivec tiny = x < -87.0f;
    x = choose(tiny, splat(-87.0f), x);
    vec t = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits
    ivec n = (ivec)t - 0x4b400000;
    vec nf = t - 12582912.0f;
    vec r = x - nf * 0.693359375f - nf * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vec)((ivec)((vec)((ivec)p + (n << 23))) & ~tiny);
}

#ifdef HAVE_DPBF16
// Transpose 16 x 16 words in registers.
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#endif

#ifdef HAVE_AMX
struct tiles {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));

// GCC's tile intrinsics do not say that they read and write memory: order them against plain accesses.
#define FENCE() __asm__ volatile("" ::: "memory")

// All eight tiles as 16 rows of 64 bytes. The configuration that oneDNN left is put back afterwards.
INLINE void tiles_begin(struct tiles *saved) {
    struct tiles all = {.palette = 1};
    for (int i = 0; i < 8; i++) all.bytes[i] = 64, all.rows[i] = 16;
    _tile_storeconfig(saved);
    FENCE();
    _tile_loadconfig(&all);
}

INLINE void tiles_end(const struct tiles *saved) {
    if (saved->palette)
        _tile_loadconfig(saved);
    else
        _tile_release();
}
#endif
