/* Host copies over random plans, and fingerprints of random texts, for the sanitizers: `copy_check [SEED [PLANS]]`. Every buffer is as long as it must be and no
 * longer, so that a byte beside it is an error of its own; what is inside is compared with a copy made token by token.
 * `copy_check planted` takes a payload that is one byte short, which must be found. */
#include "plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GROUPS = 2, LAYERS = 4, PARTS = 5 };

/* Layers of one shape in one buffer: every order of these axes, each forwards or backwards, is somebody's layout. */
typedef struct {
    int64_t layers, kv, blocks, block_tokens, heads, run, padding;
    int64_t stride[5]; /* layer, kv, block, token, head */
    size_t size;
    char *memory, *wanted, *first;
} engine;

typedef struct {
    char *memory, *begin, *wanted;
    size_t size;
} payload;

typedef struct {
    engine engines[GROUPS];
    payload payloads[PARTS];
    lmkv_row rows[GROUPS * LAYERS * 2];
    engine *owners[GROUPS * LAYERS * 2];
    lmkv_part parts[PARTS];
    lmkv_place *places;
    lmkv_plan plan;
} world;

static uint64_t state;

static int64_t below(int64_t n) { /* xorshift64* (Vigna 2016) */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (int64_t)((state * 0x2545F4914F6CDD1Dull >> 33) % (uint64_t)n);
}

static int64_t one_of(const int64_t *values, int64_t n) { return values[below(n)]; }

static char *room(size_t size, size_t shift) {
    char *memory = malloc(size + shift);
    if (!memory) abort();
    for (size_t i = 0; i < size + shift; i++) memory[i] = (char)(i * 31 + (size_t)below(7));
    return memory;
}

static void allocate(engine *e) {
    e->memory = room(e->size, 0);
    e->wanted = malloc(e->size);
    if (!e->wanted) abort();
    memcpy(e->wanted, e->memory, e->size);
}

/* The same strides again, with other blocks and maybe shorter runs. */
static void make_alike(engine *e, const engine *other) {
    int64_t shorter = below(2) ? below(other->run) : 0, first = other->first - other->memory;
    *e = *other;
    e->run -= shorter;
    e->size -= (size_t)shorter;
    allocate(e);
    e->first = e->memory + first;
}

static void make_engine(engine *e, int64_t tokens) {
    static const int64_t runs[] = {1, 16, 64, 72, 128, 160, 256, 1152, 2304}, sizes[] = {1, 2, 3, 16, 64, 256};
    e->layers = 1 + below(LAYERS);
    e->heads = 1 + below(9);
    e->kv = 1 + below(2);
    e->run = below(3) ? one_of(runs, 9) : 1 + below(700);
    e->padding = below(4) ? 0 : below(80);
    e->block_tokens = one_of(sizes, 6);
    e->blocks = tokens / e->block_tokens + 1 + below(3);
    int64_t axes[5] = {e->layers, e->kv, e->blocks, e->block_tokens, e->heads}, order[5] = {0, 1, 2, 3, 4}, stride = e->run + e->padding;
    for (int i = 4; i > 0; i--) {
        int64_t j = below(i + 1), kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
    size_t shift = (size_t)(below(2) ? below(64) : 0);
    int64_t first = 0, last = 0;
    for (int i = 4; i >= 0; i--) {
        e->stride[order[i]] = below(8) ? stride : -stride;
        if (e->stride[order[i]] < 0) first += stride * (axes[order[i]] - 1);
        last += stride * (axes[order[i]] - 1);
        stride *= axes[order[i]];
    }
    e->size = (size_t)(last + e->run) + shift;
    allocate(e);
    e->first = e->memory + shift + first;
}

static int64_t make_rows(world *w, int64_t groups, int64_t tokens) {
    int64_t bytes = 0;
    for (int64_t g = 0; g < groups; g++) {
        engine *e = &w->engines[g];
        int alike = g && below(2);
        if (alike)
            make_alike(e, &w->engines[0]);
        else
            make_engine(e, tokens);
        int64_t table = alike && below(2) ? 0 : g;
        for (int64_t layer = 0; layer < e->layers; layer++) {
            for (int64_t kv = 0; kv < e->kv; kv++, bytes += e->heads * e->run) {
                w->owners[w->plan.n_rows] = e;
                w->rows[w->plan.n_rows++] = (lmkv_row){.base = (uint64_t)(uintptr_t)(e->first + layer * e->stride[0] + kv * e->stride[1]),
                                                       .block_stride = e->stride[2], .token_stride = e->stride[3],
                                                       .head_stride = e->stride[4], .blocks = e->blocks,
                                                       .block_tokens = e->block_tokens, .heads = e->heads, .run = e->run,
                                                       .offset = bytes, .table = table};
            }
        }
    }
    return bytes;
}

/* Consecutive tokens in shuffled blocks, or each token anywhere; some of them skipped; no place twice. */
static void make_places(lmkv_place *places, const engine *e, int64_t tokens) {
    int64_t unit = below(2) ? e->block_tokens : 1, units = e->blocks * e->block_tokens / unit, skipped = below(3) ? 0 : 1 + below(4);
    int64_t *order = malloc((size_t)units * sizeof *order), start = below(e->block_tokens);
    if (!order) abort();
    for (int64_t i = 0; i < units; i++) order[i] = i;
    for (int64_t i = units - 1; i > 0 && below(16); i--) {
        int64_t j = below(i + 1), kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
    if (start + tokens > e->blocks * e->block_tokens) start = 0;
    for (int64_t t = 0; t < tokens; t++) {
        int64_t at = start + t, slot = order[at / unit] * unit + at % unit;
        places[t] = (lmkv_place){(int32_t)(slot / e->block_tokens), (int32_t)(slot % e->block_tokens)};
        if (skipped && below(9) < skipped) places[t].block = -1 - (int32_t)below(3);
    }
    free(order);
}

static void make(world *w, int planted) {
    memset(w, 0, sizeof *w);
    int64_t n = 1 + below(PARTS), tokens = 0, groups = 1 + below(GROUPS);
    for (int64_t p = 0; p < n; p++) {
        int64_t held = 1 + below(below(4) ? 40 : 300), first = below(3) ? 0 : below(held), count = below(3) ? held - first : below(held - first + 1);
        w->parts[p] = (lmkv_part){.held = held, .first = first, .tokens = count, .at = tokens};
        tokens += count;
    }
    int64_t bytes = make_rows(w, groups, tokens);
    for (int64_t p = 0; p < n; p++) {
        payload *mine = &w->payloads[p];
        size_t shift = (size_t)(below(2) ? below(64) : 0);
        mine->size = (size_t)(w->parts[p].held * bytes);
        mine->memory = room(mine->size - (planted && p == 0), shift);
        mine->begin = mine->memory + shift;
        mine->wanted = malloc(mine->size);
        if (!mine->wanted) abort();
        memcpy(mine->wanted, mine->begin, mine->size - (planted && p == 0));
        w->parts[p].payload = (uint64_t)(uintptr_t)mine->begin;
        if (planted && p == 0) w->parts[p].first = 0, w->parts[p].tokens = w->parts[p].held;
    }
    if (planted) n = 1, tokens = w->parts[0].tokens;
    w->places = malloc((size_t)(groups * tokens + 1) * sizeof *w->places);
    if (!w->places) abort();
    for (int64_t g = 0; g < groups; g++) make_places(w->places + g * tokens, &w->engines[g], tokens);
    if (planted) w->places[groups * tokens - 1] = (lmkv_place){0, 0};
    w->plan = (lmkv_plan){w->rows, w->plan.n_rows, w->parts, n, w->places, tokens, groups};
}

/* What the copy must make of the buffers, token by token. Returns the bytes. */
static int64_t expect(world *w, int into_payloads) {
    int64_t total = 0;
    for (int64_t p = 0; p < w->plan.n_parts; p++) {
        const lmkv_part *part = &w->parts[p];
        for (int64_t r = 0; r < w->plan.n_rows; r++) {
            const lmkv_row *row = &w->rows[r];
            engine *e = w->owners[r];
            for (int64_t t = 0; t < part->tokens; t++) {
                lmkv_place place = w->places[row->table * w->plan.n_places + part->at + t];
                for (int64_t h = 0; h < row->heads && place.block >= 0; h++, total += row->run) {
                    char *theirs = (char *)(uintptr_t)row->base + place.block * row->block_stride + place.index * row->token_stride + h * row->head_stride;
                    int64_t mine = part->held * row->offset + (h * part->held + part->first + t) * row->run;
                    if (into_payloads)
                        memcpy(w->payloads[p].wanted + mine, theirs, (size_t)row->run);
                    else
                        memcpy(e->wanted + (theirs - e->memory), w->payloads[p].begin + mine, (size_t)row->run);
                }
            }
        }
    }
    return total;
}

static int check(world *w, int into_payloads, int threads) {
    char why[300] = "";
    int64_t wanted = expect(w, into_payloads), got = lmkv_host_copy(&w->plan, into_payloads, threads, why, sizeof why);
    int same = got == wanted;
    for (int64_t p = 0; p < w->plan.n_parts; p++) same = same && !memcmp(w->payloads[p].begin, w->payloads[p].wanted, w->payloads[p].size);
    for (int g = 0; g < GROUPS; g++) same = same && (!w->engines[g].memory || !memcmp(w->engines[g].memory, w->engines[g].wanted, w->engines[g].size));
    if (!same) fprintf(stderr, "other bytes than expected: %lld of %lld, %s\n", (long long)got, (long long)wanted, why);
    return same;
}

static void drop(world *w) {
    for (int g = 0; g < GROUPS; g++) free(w->engines[g].memory), free(w->engines[g].wanted);
    for (int p = 0; p < PARTS; p++) free(w->payloads[p].memory), free(w->payloads[p].wanted);
    free(w->places);
}

/* Fingerprints by the letter of docs/format.md. */
static int check_windows(void) {
    int64_t n = 1 + below(300), width = 1 + below(below(2) ? 20 : 80), windows = n < width ? 0 : n - width + 1, same = 1;
    uint64_t seed = (uint64_t)below(1 << 30);
    uint32_t *tokens = malloc((size_t)n * sizeof *tokens);
    uint64_t *prints = malloc((size_t)windows * sizeof *prints + !windows);
    if (!tokens || !prints) abort();
    for (int64_t i = 0; i < n; i++) tokens[i] = (uint32_t)below(below(2) ? 3 : (int64_t)1 << 31) * 2u;
    same = lmkv_windows(tokens, n, width, seed, prints) == windows;
    for (int64_t i = 0; i < windows; i++) {
        uint64_t sum = 0;
        for (int64_t j = 0; j < width; j++) sum = sum * 0xD1342543DE82EF95u + ((uint64_t)tokens[i + j] + 1) * 0x9E3779B97F4A7C15u;
        same = same && prints[i] == (sum >> 4 ^ seed);
    }
    free(tokens);
    free(prints);
    if (!same) fprintf(stderr, "other fingerprints than expected: %lld tokens, width %lld\n", (long long)n, (long long)width);
    return same;
}

/* Bytes at any address, more than streaming begins at or fewer, and none beside them. */
static int check_bytes(void) {
    int64_t n = below(2) ? below(200) : below(3 * 65536), before = below(80), shift = below(80);
    char *from = malloc((size_t)(n + shift) + 1), *to = malloc((size_t)(n + before) + 64);
    if (!from || !to) abort();
    for (int64_t i = 0; i < n + shift; i++) from[i] = (char)below(256);
    memset(to, 0x5A, (size_t)(n + before) + 64);
    lmkv_copy((uint64_t)(uintptr_t)(to + before), (uint64_t)(uintptr_t)(from + shift), n);
    int same = !memcmp(to + before, from + shift, (size_t)n);
    for (int64_t i = 0; i < before; i++) same = same && to[i] == 0x5A;
    for (int64_t i = 0; i < 64; i++) same = same && to[before + n + i] == 0x5A;
    free(from);
    free(to);
    if (!same) fprintf(stderr, "other bytes than expected: %lld copied to an address that ends in %lld\n", (long long)n, (long long)before);
    return same;
}

int main(int argc, char **argv) {
    int planted = argc > 1 && !strcmp(argv[1], "planted");
    uint64_t seed = argc > 1 && !planted ? strtoull(argv[1], NULL, 10) : 1;
    int64_t plans = argc > 2 ? atoll(argv[2]) : planted ? 1 : 400;
    for (int64_t i = 0; i < plans; i++) {
        static world w;
        state = (seed * 1000003u + (uint64_t)i) * 0x9E3779B97F4A7C15ull | 1;
        for (int warm = 0; warm < 8; warm++) below(2);
        make(&w, planted);
        int into_payloads = planted || below(2);
        if (!check(&w, into_payloads, (int)(below(4) ? 1 : 2 + below(3))) || !check_windows() || !check_bytes()) {
            fprintf(stderr, "plan %lld of seed %llu\n", (long long)i, (unsigned long long)seed);
            return 1;
        }
        drop(&w);
    }
    printf("%lld plans: the bytes expected, and no others\n", (long long)plans);
    return 0;
}
