/* Fingerprints of all windows of a text (docs/format.md, "Content fingerprint"), in one pass. */
#include "plan.h"

static const uint64_t A = 0x9E3779B97F4A7C15u, B = 0xD1342543DE82EF95u;
enum { DROPPED = 4, LANES = 4 /* stretches of a text that are hashed beside each other, since each step waits for the one before */ };

static inline uint64_t mixed(uint32_t token) { return ((uint64_t)token + 1) * A; }

static uint64_t first_window(const uint32_t *tokens, int64_t width) {
    uint64_t sum = 0;
    for (int64_t j = 0; j < width; j++) sum = sum * B + mixed(tokens[j]);
    return sum;
}

int64_t lmkv_windows(const uint32_t *tokens, int64_t n, int64_t width, uint64_t seed, uint64_t *prints) {
    if (width < 1 || n < width) return 0;
    int64_t windows = n - width + 1, share = windows / LANES, at = 0;
    uint64_t leaving = 1, sums[LANES];
    for (int64_t j = 0; j < width; j++) leaving *= B; /* B^width: what a token counts once it has left the window */
    if (share > width) { /* else their first windows cost more than they save */
        for (int lane = 0; lane < LANES; lane++) sums[lane] = first_window(tokens + lane * share, width);
        for (int64_t i = 0;; i++) {
            for (int lane = 0; lane < LANES; lane++) prints[lane * share + i] = (sums[lane] >> DROPPED) ^ seed;
            if (i + 1 == share) break;
            for (int lane = 0; lane < LANES; lane++) {
                const uint32_t *window = tokens + lane * share + i;
                sums[lane] = sums[lane] * B + (mixed(window[width]) - mixed(window[0]) * leaving);
            }
        }
        at = LANES * share;
    }
    uint64_t sum = at < windows ? first_window(tokens + at, width) : 0;
    for (; at < windows; at++) {
        prints[at] = (sum >> DROPPED) ^ seed;
        if (at + 1 < windows) sum = sum * B + (mixed(tokens[at + width]) - mixed(tokens[at]) * leaving);
    }
    return windows;
}
