/* Random copies through native/gpu*.c on the emulated driver, compared with a plain loop over single bytes. Arguments: first seed, cases.
 * Prints how many copies were right; built with sanitizers by test_emulated_gpu.py. */
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

extern "C" {
#include "../../native/lmkv.h"
void emulated_seed(unsigned seed);
int cuMemAlloc_v2(uint64_t *address, size_t bytes);
int cuMemFree_v2(uint64_t address);
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream);
int cuStreamSynchronize(void *stream);
}

static std::mt19937 dice;
static int64_t any(int64_t low, int64_t high) { return low + (int64_t)(dice() % (uint64_t)(high - low + 1)); }
static int64_t one_of(std::vector<int64_t> values) { return values[dice() % values.size()]; }

struct Case {
    std::vector<lmkv_row> rows;
    std::vector<lmkv_part> parts;
    std::vector<lmkv_place> places;
    std::vector<uint64_t> engine; /* allocations of device memory */
    std::vector<size_t> engine_bytes;
    std::vector<char> slots;
    int64_t tables, n_places = 0, slot_bytes, slot_tokens;
};

/* Engine memory of one of the orders that engines have, with a row's K and V apart or side by side. */
static void make_rows(Case &c) {
    c.tables = any(1, 2);
    std::vector<int64_t> block_tokens = {one_of({1, 3, 16, 32}), one_of({1, 4, 16})};
    int64_t layers = any(1, 6), offset = 0, item = one_of({1, 2, 4});
    for (int64_t layer = 0; layer < layers; layer++) {
        int64_t heads = any(1, 4), size = one_of({5, 16, 24, 64, 72}) * item, table = c.tables == 2 ? layer % 2 : 0;
        int64_t tokens = block_tokens[table], blocks = any(24, 40), pad = any(0, 1) * item;
        bool packed = any(0, 1), heads_first = any(0, 1);
        int64_t token = (packed ? 2 * size : size) + pad, kinds = 2;
        int64_t token_stride = heads_first ? token : heads * token, head_stride = heads_first ? tokens * token : token;
        int64_t kind_stride = packed ? size : heads * tokens * token, block_stride = (packed ? 1 : kinds) * heads * tokens * token;
        uint64_t memory = 0;
        size_t bytes = (size_t)(blocks * block_stride);
        if (cuMemAlloc_v2(&memory, bytes)) exit(3);
        for (size_t i = 0; i < bytes; i++) ((char *)(uintptr_t)memory)[i] = (char)dice();
        c.engine.push_back(memory);
        c.engine_bytes.push_back(bytes);
        for (int64_t kind = 0; kind < kinds; kind++) {
            c.rows.push_back({memory + (uint64_t)(kind * kind_stride), block_stride, token_stride, head_stride, blocks, tokens, heads, size,
                              offset, table});
            offset += heads * size;
        }
    }
    c.slot_tokens = one_of({8, 13, 64, 256});
    c.slot_bytes = (offset * c.slot_tokens + 4095) / 4096 * 4096;
}

static void make_parts(Case &c, int chunks) {
    c.slots.resize((size_t)(c.slot_bytes * chunks));
    for (char &byte : c.slots) byte = (char)dice();
    for (int i = 0; i < chunks; i++) {
        int64_t held = i + 1 < chunks ? c.slot_tokens : any(1, c.slot_tokens);
        int64_t first = any(0, 3) ? 0 : any(0, held - 1), tokens = any(0, 3) ? held - first : any(0, held - first);
        c.parts.push_back({(uint64_t)(uintptr_t)c.slots.data() + (uint64_t)(c.slot_bytes * i), held, first, tokens, c.n_places});
        c.n_places += tokens;
    }
    c.places.resize((size_t)(c.tables * c.n_places));
    bool skips = any(0, 2) == 0;
    for (int64_t table = 0; table < c.tables; table++) { /* each place at most once: blocks in a random order, tokens within them in turn */
        int64_t blocks = INT64_MAX, tokens = 1;
        for (const lmkv_row &row : c.rows) {
            if (row.table != table) continue;
            if (row.blocks < blocks) blocks = row.blocks;
            tokens = row.block_tokens;
        }
        std::vector<lmkv_place> all;
        for (int32_t b = 0; blocks != INT64_MAX && b < blocks; b++) {
            for (int32_t t = 0; t < tokens; t++) all.push_back({b, t});
        }
        if (any(0, 1)) std::shuffle(all.begin(), all.end(), dice);
        for (int64_t i = 0; i < c.n_places; i++) {
            lmkv_place place = (size_t)i < all.size() ? all[(size_t)i] : lmkv_place{-1, 0};
            if (skips && any(0, 4) == 0) place.block = -1;
            c.places[(size_t)(table * c.n_places + i)] = place;
        }
    }
}

/* The same copy, byte by byte, between images of all memory. */
static void reference(const Case &c, bool into, std::vector<std::vector<char>> &engine, std::vector<char> &slots) {
    for (const lmkv_row &row : c.rows) {
        size_t which = 0;
        while (row.base - c.engine[which] >= c.engine_bytes[which] || row.base < c.engine[which]) which++;
        for (const lmkv_part &part : c.parts) {
            for (int64_t t = 0; t < part.tokens; t++) {
                lmkv_place place = c.places[(size_t)(row.table * c.n_places + part.at + t)];
                if (place.block < 0) continue;
                for (int64_t h = 0; h < row.heads; h++) {
                    for (int64_t b = 0; b < row.run; b++) {
                        size_t there = (size_t)(row.base - c.engine[which]) +
                                       (size_t)(place.block * row.block_stride + place.index * row.token_stride + h * row.head_stride + b);
                        size_t here = (size_t)(part.payload - (uint64_t)(uintptr_t)c.slots.data()) +
                                      (size_t)(part.held * row.offset + (h * part.held + part.first + t) * row.run + b);
                        if (into)
                            slots[here] = engine[which][there];
                        else
                            engine[which][there] = slots[here];
                    }
                }
            }
        }
    }
}

static int run(lmkv_gpu *gpu, unsigned seed) {
    char why[400] = "";
    dice.seed(seed);
    emulated_seed(seed);
    Case c;
    make_rows(c);
    make_parts(c, (int)any(1, 7));
    lmkv_gpu_options options = {one_of({4096, 16384, 65536, 1 << 20}), one_of({2, 3, 4}), any(1, 9), any(1, 3), one_of({32, 96, 512}),
                                one_of({0, 0, 1 << 14, 1 << 30})};
    if (lmkv_gpu_tune(gpu, &options, why, sizeof why)) return fprintf(stderr, "tune: %s\n", why), 1;
    bool pinned = any(0, 4) > 0, into = any(0, 1);
    uint64_t address = (uint64_t)(uintptr_t)c.slots.data();
    if (pinned && lmkv_gpu_pin(gpu, address, c.slots.size(), why, sizeof why)) return fprintf(stderr, "pin: %s\n", why), 1;
    std::vector<std::vector<char>> engine;
    for (size_t i = 0; i < c.engine.size(); i++) {
        const char *from = (const char *)(uintptr_t)c.engine[i];
        engine.emplace_back(from, from + c.engine_bytes[i]);
        memset((char *)(uintptr_t)c.engine[i], 0x5A, c.engine_bytes[i]); /* what it holds comes in the caller's stream */
        if (cuMemcpyHtoDAsync_v2(c.engine[i], engine[i].data(), c.engine_bytes[i], nullptr)) return 1;
    }
    std::vector<char> slots = c.slots;
    reference(c, into, engine, slots);
    std::vector<int64_t> ends;
    for (int64_t r = 1; r < (int64_t)c.rows.size(); r++) {
        if (any(0, 2) == 0) ends.push_back(r);
    }
    ends.push_back((int64_t)c.rows.size());
    lmkv_plan plan = {c.rows.data(), (int64_t)c.rows.size(), c.parts.data(), (int64_t)c.parts.size(), c.places.data(), c.n_places, c.tables};
    lmkv_gpu_copy *copy = lmkv_gpu_start(gpu, &plan, into, ends.data(), (int64_t)ends.size(), 0, why, sizeof why);
    if (!copy) return fprintf(stderr, "start: %s\n", why), 1;
    if (lmkv_gpu_order(copy, any(0, (int64_t)c.rows.size() - 1), 0, why, sizeof why)) return fprintf(stderr, "order: %s\n", why), 1;
    if (any(0, 1)) {
        while (!lmkv_gpu_done(copy, why, sizeof why)) {
        }
    }
    if (lmkv_gpu_wait(copy, why, sizeof why)) return fprintf(stderr, "wait: %s\n", why), 1;
    lmkv_gpu_forget(copy);
    cuStreamSynchronize(nullptr); /* a copy of no tokens waits for nothing */
    int wrong = slots != c.slots;
    for (size_t i = 0; i < c.engine.size(); i++) {
        wrong |= memcmp(engine[i].data(), (const char *)(uintptr_t)c.engine[i], c.engine_bytes[i]) != 0;
        cuMemFree_v2(c.engine[i]);
    }
    if (pinned) lmkv_gpu_unpin(gpu, address, why, sizeof why);
    if (wrong) fprintf(stderr, "seed %u: wrong bytes (into payloads %d, pinned %d)\n", seed, into, pinned);
    return wrong;
}

int main(int argc, char **argv) {
    char why[400] = "";
    unsigned first = argc > 1 ? (unsigned)atoi(argv[1]) : 1, cases = argc > 2 ? (unsigned)atoi(argv[2]) : 200;
    lmkv_gpu *gpu = lmkv_gpu_open(0, "image", why, sizeof why);
    if (!gpu) return fprintf(stderr, "open: %s\n", why), 1;
    for (unsigned seed = first; seed < first + cases; seed++) {
        if (run(gpu, seed)) return 1;
    }
    printf("right: %u\n", cases);
    return 0;
}
