/* Host copies. Measured on a Xeon (Sapphire Rapids) with 64 KiB runs of 448 MiB, one large memcpy = 1: memcpy of each run 0.57,
 * since short copies read every line that they are about to overwrite; streaming stores 0.73; streaming stores that work at
 * 4, 8, 12 places of the run in turn 0.93, 0.94, 0.98, since that keeps more of the memory's banks busy. */
#include "plan.h"

#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#define LMKV_STREAMING 1
#else
#define LMKV_STREAMING 0
#endif

enum {
    LINE = 64,
    STEP = 2 * LINE,      /* bytes copied at one place before going to the next */
    AHEAD = 4 * LINE,     /* prefetch distance */
    PLACES = 12,          /* no power of two, so that the places do not fall into the same cache sets */
    GROUP = 64 << 10,     /* longer runs are taken in pieces of this size */
    STREAM_RUN = 16 << 10 /* shorter runs stay with memcpy */
};
static const int64_t STREAM_TOTAL = 4 << 20; /* a copy that fits the caches is wanted in them */

#if LMKV_STREAMING
static inline void stream_line(char *dst, const char *src) {
    const __m128i *from = (const __m128i *)src;
    __m128i *to = (__m128i *)dst;
    __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
}

static void stream(char *dst, const char *src, size_t n) {
    size_t head = (LINE - ((uintptr_t)dst & (LINE - 1))) & (LINE - 1);
    if (head > n) head = n;
    memcpy(dst, src, head);
    dst += head;
    src += head;
    n -= head;
    while (n >= PLACES * STEP) {
        size_t share = (n < GROUP ? n : GROUP) / PLACES / STEP * STEP;
        for (size_t at = 0; at < share; at += STEP) {
            for (size_t place = 0; place < PLACES; place++) {
                const char *from = src + place * share + at;
                char *to = dst + place * share + at;
                _mm_prefetch(from + AHEAD, _MM_HINT_T0);
                _mm_prefetch(from + AHEAD + LINE, _MM_HINT_T0);
                stream_line(to, from);
                stream_line(to + LINE, from + LINE);
            }
        }
        dst += PLACES * share;
        src += PLACES * share;
        n -= PLACES * share;
    }
    while (n >= LINE) {
        stream_line(dst, src);
        dst += LINE;
        src += LINE;
        n -= LINE;
    }
    memcpy(dst, src, n);
}
#endif

static void copy_run(char *dst, const char *src, size_t n, int streaming) {
#if LMKV_STREAMING
    if (streaming && n >= STREAM_RUN) {
        stream(dst, src, n);
        return;
    }
#endif
    (void)streaming;
    memcpy(dst, src, n);
}

/* Copy a token range of one row and head: `tokens` runs of `run` bytes. */
static void copy_tokens(char *dst, const char *src, int64_t tokens, int64_t run, int64_t dst_token, int64_t src_token, int streaming) {
    if (src_token == run && dst_token == run) {
        copy_run(dst, src, (size_t)(tokens * run), streaming);
        return;
    }
    for (int64_t t = 0; t < tokens; t++) {
        copy_run(dst, src, (size_t)run, streaming);
        dst += dst_token;
        src += src_token;
    }
}

/* One row of one part. Tokens that follow each other in a block are one piece. */
static void copy_row(const lmkv_row *row, const lmkv_part *part, const lmkv_place *places, int into_payloads, int streaming) {
    char *payload = (char *)(uintptr_t)part->payload + part->held * row->offset;
    for (int64_t h = 0; h < row->heads; h++) {
        char *mine = payload + (h * part->held + part->first) * row->run;
        char *theirs = (char *)(uintptr_t)row->base + h * row->head_stride;
        for (int64_t t = 0; t < part->tokens;) {
            int32_t block = places[t].block, index = places[t].index;
            int64_t n = 1;
            while (t + n < part->tokens && places[t + n].block == block && places[t + n].index == index + n) n++;
            if (block >= 0) {
                char *there = theirs + block * row->block_stride + index * row->token_stride, *here = mine + t * row->run;
                if (into_payloads)
                    copy_tokens(here, there, n, row->run, row->run, row->token_stride, streaming);
                else
                    copy_tokens(there, here, n, row->run, row->token_stride, row->run, streaming);
            }
            t += n;
        }
    }
}

int64_t lmkv_host_copy(const lmkv_plan *plan, int into_payloads, int threads, char *why, size_t room) {
    int64_t total = lmkv_check(plan, why, room);
    (void)threads;
    for (int64_t p = 0; total > 0 && p < plan->n_parts; p++) {
        const lmkv_part *part = &plan->parts[p];
        for (int64_t r = 0; r < plan->n_rows; r++) {
            const lmkv_row *row = &plan->rows[r];
            copy_row(row, part, plan->places + row->table * plan->n_places + part->at, into_payloads, total >= STREAM_TOTAL);
        }
    }
#if LMKV_STREAMING
    _mm_sfence(); /* streamed bytes are seen before whatever the caller does next */
#endif
    return total;
}
