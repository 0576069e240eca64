/* Lines of the processor's caches: fetched ahead, and put around the caches. */
#ifndef LMKV_LINES_H
#define LMKV_LINES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#define LMKV_STREAMING 1
#if defined(__SANITIZE_ADDRESS__) /* which does not see streaming stores */
#define LMKV_STREAM(to, value) (*(to) = (value))
#else
#define LMKV_STREAM(to, value) _mm_stream_si128(to, value)
#endif
#else
#define LMKV_STREAMING 0
#endif

enum { LINE = 64 };

#if defined(__GNUC__)
#define LMKV_INLINE inline __attribute__((always_inline)) /* gcc drops calls of functions that only fetch */
#else
#define LMKV_INLINE inline
#endif

#if LMKV_STREAMING
static LMKV_INLINE void fetch(const char *from, int near) {
    if (near)
        _mm_prefetch(from, _MM_HINT_T0);
    else
        _mm_prefetch(from, _MM_HINT_T1);
}

static LMKV_INLINE void put_line(char *to, const char *from) {
    const __m128i *source = (const __m128i *)from;
    __m128i *target = (__m128i *)to;
    __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    LMKV_STREAM(target, a);
    LMKV_STREAM(target + 1, b);
    LMKV_STREAM(target + 2, c);
    LMKV_STREAM(target + 3, d);
}

/* Whole lines of the destination go around the caches, the rest through them. */
static inline void put_lines(char *to, const char *from, size_t n) {
    if ((((uintptr_t)to | n) & (LINE - 1)) != 0) {
        size_t before = (LINE - ((uintptr_t)to & (LINE - 1))) & (LINE - 1);
        if (before > n) before = n;
        memcpy(to, from, before);
        to += before;
        from += before;
        n -= before;
    }
    for (; n >= LINE; to += LINE, from += LINE, n -= LINE) put_line(to, from);
    if (n) memcpy(to, from, n);
}

/* Lines that two runs share are put together by the processor, if the second comes soon after the first. */
static inline void put_sixteens(char *to, const char *from, size_t n) {
    if (((uintptr_t)to & 15) == 0) {
        for (; n >= 16; to += 16, from += 16, n -= 16) LMKV_STREAM((__m128i *)to, _mm_loadu_si128((const __m128i *)from));
    }
    if (n) memcpy(to, from, n);
}
#else
static LMKV_INLINE void fetch(const char *from, int near) {
#if defined(__GNUC__)
    __builtin_prefetch(from);
#else
    (void)from;
#endif
    (void)near;
}

static inline void put_line(char *to, const char *from) { memcpy(to, from, LINE); }
static inline void put_lines(char *to, const char *from, size_t n) { memcpy(to, from, n); }
static inline void put_sixteens(char *to, const char *from, size_t n) { memcpy(to, from, n); }
#endif

#endif
