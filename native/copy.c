/* Host copies. What they cost is the memory's time, and that depends on order. Measured on a Xeon (Sapphire Rapids) with 300 MB and
 * runs of 256 bytes, one large memcpy = 1: memcpy of each run 0.38 to 0.46, since that reads every line that it is about to
 * overwrite; streaming stores, one place after the other, 0.69 to 0.77; streaming stores while what comes next is fetched from
 * eight places in turn, some KiB apart, 0.95 to 1.05. So a copy is cut into tiles of 64 KiB: atoms (short runs of bytes, the same for
 * all heads) times columns (heads). A tile is written in an order of its own while the next one's sources are fetched in theirs.
 * On an EPYC (Zen 3) eight places cost what they give on the Xeon: 0.64 to 0.85 of memcpy, against 0.89 to 1.02 with longer atoms
 * that are fetched from three places and written one after the other (both in one process, docs/benchmarks.md). */
#include "plan.h"

#include <pthread.h>
#include <stdatomic.h>
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

enum {
    LINE = 64,
    TILE = 64 << 10,   /* bytes of a tile, about: sources are fetched that far ahead */
    LONGEST = 8 << 10, /* bytes of an atom, about, however many there are */
    ELEMENTS = 512,    /* most atoms times columns of a tile */
    COLUMNS = 64,      /* most of them that are heads */
    ATOMS = 2048,      /* cut at a time */
    ROWS = 8,          /* that a thread takes at a time; even, so that K and V stay together */
    MOST_THREADS = 64
};
#ifndef LMKV_STREAM_TOTAL
#define LMKV_STREAM_TOTAL (4 << 20) /* bytes: a smaller copy fits the caches and is wanted in them */
#endif

/* What a processor likes: bytes copied at one place before going to the next, and from and to how many places in turn. */
typedef struct {
    int64_t step, reading, writing;
} manner;

static const manner MANY_PLACES = {256, 8, 8};
#if LMKV_STREAMING && defined(__GNUC__)
static const manner FEW_PLACES = {512, 3, 1};
static const manner *manner_here(void) { return __builtin_cpu_is("amd") ? &FEW_PLACES : &MANY_PLACES; }
#else
static const manner *manner_here(void) { return &MANY_PLACES; }
#endif

/* Contiguous bytes on both sides, as offsets from where head 0 begins. */
typedef struct {
    int64_t from, to, bytes;
} atom;

typedef struct {
    int16_t atom, column;
} element;

/* The orders in which tiles of some number of atoms and columns are read and written. */
typedef struct {
    int64_t atoms, columns, from_group, to_group, places;
    element reading[ELEMENTS], writing[ELEMENTS];
} order;

/* How bytes are put down: through the caches, as whole lines around them, or around them as they come, where lines are shared. */
typedef enum { CACHED, LINES, SIXTEENS } way;

typedef struct {
    const order *order;
    const atom *atoms;
    const char *from; /* of column 0 */
    char *to;
    int64_t from_column, to_column; /* strides */
    way way;
} tile;

/* What one thread copies with. */
typedef struct {
    const manner *manner;
    int streaming, busy;
    tile now;
    /* of the atoms: */
    int64_t n_atoms, width, from_group, to_group;
    way way;
    order orders[2]; /* of whole tiles, and of the last one */
    atom atoms[ATOMS];
} hand;

/* One copy, shared by threads. */
typedef struct {
    const lmkv_plan *plan;
    int into_payloads, streaming;
    int64_t rows, groups; /* rows that a thread takes at a time; how many times */
    atomic_llong next;
} job;

#if defined(__GNUC__)
#define LMKV_INLINE inline __attribute__((always_inline)) /* gcc drops calls of functions that only fetch */
#else
#define LMKV_INLINE inline
#endif

#if LMKV_STREAMING
static LMKV_INLINE void fetch(const char *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) _mm_prefetch(from + i, _MM_HINT_T1);
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
    for (; n >= LINE; to += LINE, from += LINE, n -= LINE) {
        const __m128i *source = (const __m128i *)from;
        __m128i *target = (__m128i *)to;
        __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        LMKV_STREAM(target, a);
        LMKV_STREAM(target + 1, b);
        LMKV_STREAM(target + 2, c);
        LMKV_STREAM(target + 3, d);
    }
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
static LMKV_INLINE void fetch(const char *from, int64_t bytes) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(from + i);
#else
    (void)from, (void)bytes;
#endif
}

static inline void put_lines(char *to, const char *from, size_t n) { memcpy(to, from, n); }
static inline void put_sixteens(char *to, const char *from, size_t n) { memcpy(to, from, n); }
#endif

static inline const char *source(const tile *t, element e) { return t->from + t->atoms[e.atom].from + e.column * t->from_column; }

static inline void put_element(const tile *t, element e) {
    const atom *a = &t->atoms[e.atom];
    char *to = t->to + a->to + e.column * t->to_column;
    if (t->way == LINES)
        put_lines(to, source(t, e), (size_t)a->bytes);
    else if (t->way == SIXTEENS)
        put_sixteens(to, source(t, e), (size_t)a->bytes);
    else
        memcpy(to, source(t, e), (size_t)a->bytes);
}

/* Copy one tile and fetch the next one's sources meanwhile. */
static void copy_tile(const tile *now, const tile *next) {
    int64_t n = now->order->atoms * now->order->columns;
    int64_t ahead = next && next->way != CACHED ? next->order->atoms * next->order->columns : 0;
    for (int64_t i = 0; i < n || i < ahead; i++) {
        if (i < ahead) {
            element e = next->order->reading[i];
            fetch(source(next, e), next->atoms[e.atom].bytes);
        }
        if (i < n) put_element(now, now->order->writing[i]);
    }
}

/* Hand over the next tile; null: none, finish. */
static void push(hand *hand, const tile *next) {
    if (hand->busy) copy_tile(&hand->now, next);
    hand->busy = next != NULL;
    if (next) hand->now = *next;
}

/* Cut the elements, in the order of their addresses, into as many equal stretches as there are places, and take one of each in
 * turn. By address, `group` atoms of a column follow each other, then as many of the next column. */
static void in_turn(element *out, int64_t atoms, int64_t columns, int64_t group, int64_t places) {
    int64_t n = atoms * columns, stretch = (n + places - 1) / places;
    for (int64_t i = 0; i < stretch; i++) {
        for (int64_t at = i; at < n; at += stretch) {
            int64_t first = at / (group * columns) * group, wide = atoms - first < group ? atoms - first : group;
            int64_t within = at - first * columns;
            *out++ = (element){(int16_t)(first + within % wide), (int16_t)(within / wide)};
        }
    }
}

static const order *order_of(hand *hand, int last, int64_t atoms, int64_t columns) {
    order *found = &hand->orders[last];
    int64_t places = hand->way == SIXTEENS ? 1 : hand->manner->writing;
    if (found->atoms == atoms && found->columns == columns && found->from_group == hand->from_group &&
        found->to_group == hand->to_group && found->places == places)
        return found;
    push(hand, NULL); /* it may be in use */
    found->atoms = atoms;
    found->columns = columns;
    found->from_group = hand->from_group;
    found->to_group = hand->to_group;
    found->places = places;
    in_turn(found->reading, atoms, columns, hand->from_group, hand->manner->reading);
    in_turn(found->writing, atoms, columns, hand->to_group, places);
    return found;
}

/* One row, or K and V that lie side by side, of one part; where both sides begin, and how they go on. */
typedef struct {
    const lmkv_row *row;
    const lmkv_part *part;
    const lmkv_place *places;
    int64_t payload_column;         /* from head to head in the payload */
    int64_t twins;                  /* 1, or 2: the next row too */
    int64_t twin_row, twin_payload; /* from the one to the other in the engine's memory and in the payload */
    const char *from;
    char *to;
    int into_payloads;
} strip;

static void describe(strip *s, const job *job, int64_t p, int64_t r, int64_t end) {
    const lmkv_plan *plan = job->plan;
    const lmkv_row *row = &plan->rows[r], *next = row + 1;
    const lmkv_part *part = &plan->parts[p];
    char *payload = (char *)(uintptr_t)part->payload + part->held * row->offset, *theirs = (char *)(uintptr_t)row->base;
    *s = (strip){.row = row, .part = part, .places = plan->places + row->table * plan->n_places + part->at, .twins = 1};
    s->payload_column = part->held * row->run;
    s->into_payloads = job->into_payloads;
    s->from = job->into_payloads ? theirs : payload;
    s->to = job->into_payloads ? payload : theirs;
    if (r + 1 >= end || next->block_stride != row->block_stride || next->token_stride != row->token_stride ||
        next->head_stride != row->head_stride || next->heads != row->heads || next->run != row->run || next->table != row->table)
        return;
    int64_t apart = (int64_t)(next->base - row->base);
    if (apart == row->run || (row->block_tokens == 1 && apart == row->heads * row->run)) {
        s->twins = 2;
        s->twin_row = apart;
        s->twin_payload = part->held * (next->offset - row->offset);
    }
}

/* Whether the atoms of one strip are those of another too. */
static int same_atoms(const strip *a, const strip *b) {
    return a->part == b->part && a->places == b->places && a->twins == b->twins && a->twin_row == b->twin_row &&
           a->twin_payload == b->twin_payload && a->row->block_stride == b->row->block_stride &&
           a->row->token_stride == b->row->token_stride && a->row->run == b->row->run && a->row->heads == b->row->heads &&
           a->row->head_stride == b->row->head_stride && (((uintptr_t)a->to ^ (uintptr_t)b->to) & (LINE - 1)) == 0;
}

/* Append contiguous bytes. What lies together becomes one run, cut where the destination's lines begin, after `step` bytes or a
 * little more. */
static void append(hand *hand, const char *base, int64_t from, int64_t to, int64_t bytes, int64_t step) {
    while (bytes > 0) {
        atom *last = hand->n_atoms ? &hand->atoms[hand->n_atoms - 1] : NULL;
        if (!last || last->from + last->bytes != from || last->to + last->bytes != to) {
            last = &hand->atoms[hand->n_atoms++];
            *last = (atom){from, to, 0};
        }
        int64_t room = step + (int64_t)(-((uintptr_t)base + (uintptr_t)last->to) & (LINE - 1)) - last->bytes;
        if (room <= 0) {
            hand->atoms[hand->n_atoms++] = (atom){from, to, 0};
            continue;
        }
        int64_t n = bytes < room ? bytes : room;
        last->bytes += n;
        from += n;
        to += n;
        bytes -= n;
    }
}

/* Atoms of the tokens from `t` on, as many as there is room for; returns the first token that is left. */
static int64_t cut(hand *hand, const strip *s, int64_t t) {
    const lmkv_row *row = s->row;
    int64_t step = hand->manner->step, most;
    while (step < LONGEST && s->part->tokens * (row->run / step) > ATOMS / 2) step *= 2; /* a chunk in one cut, if it can be */
    while (row->run / step > ATOMS / 8) step *= 2;
    most = s->twins * (row->run / step + 2);
    for (hand->n_atoms = 0; t < s->part->tokens && hand->n_atoms + most <= ATOMS; t++) {
        if (s->places[t].block < 0) continue;
        int64_t theirs = s->places[t].block * row->block_stride + s->places[t].index * row->token_stride;
        int64_t mine = (s->part->first + t) * row->run;
        for (int64_t twin = 0; twin < s->twins; twin++, theirs += s->twin_row, mine += s->twin_payload) {
            if (s->into_payloads)
                append(hand, s->to, theirs, mine, row->run, step);
            else
                append(hand, s->to, mine, theirs, row->run, step);
        }
    }
    return t;
}

static int64_t size(int64_t stride) { return stride < 0 ? -stride : stride; }

/* How many atoms lie within one column in the engine's memory before the next column's. */
static int64_t group(const hand *hand, const strip *s) {
    int64_t most = 1, first = 0, column = size(s->row->head_stride);
    if (s->row->heads == 1) return ATOMS;
    for (int64_t i = 1, groups = 0; i <= hand->n_atoms && groups < 2; i++) { /* the first may be the end of a block */
        const atom *a = &hand->atoms[first], *b = &hand->atoms[i];
        if (i < hand->n_atoms && size(s->into_payloads ? b->from - a->from : b->to - a->to) < column) continue;
        if (i - first > most) most = i - first;
        first = i;
        groups++;
    }
    return most;
}

/* How tiles of the atoms that were cut are made and copied. */
static void survey(hand *hand, const strip *s) {
    const lmkv_row *row = s->row;
    int64_t columns = row->heads < COLUMNS ? row->heads : COLUMNS, bytes = 0, shared = 0;
    uintptr_t column = (uintptr_t)(s->into_payloads ? s->payload_column : row->head_stride);
    for (int64_t i = 0; i < hand->n_atoms; i++) {
        bytes += hand->atoms[i].bytes;
        shared += (((uintptr_t)s->to + (uintptr_t)hand->atoms[i].to) | (uintptr_t)hand->atoms[i].bytes | column) % LINE != 0;
    }
    hand->way = !hand->streaming ? CACHED : shared * 32 <= hand->n_atoms ? LINES : SIXTEENS;
    int64_t row_group = group(hand, s);
    hand->from_group = s->into_payloads ? row_group : ATOMS; /* in a payload a head's tokens are one run */
    hand->to_group = s->into_payloads ? ATOMS : row_group;
    int64_t tiles = (bytes * columns + TILE / 2) / TILE; /* of one size, as far as can be */
    int64_t width = tiles > 1 ? (hand->n_atoms + tiles - 1) / tiles : hand->n_atoms;
    if (width > ELEMENTS / columns) width = ELEMENTS / columns;
    if (width > row_group) width -= width % row_group;
    hand->width = width < 1 ? 1 : width;
}

/* Copy the atoms that were cut, of all heads. */
static void copy_atoms(hand *hand, const strip *s) {
    const lmkv_row *row = s->row;
    int into = s->into_payloads;
    int64_t most = row->heads < COLUMNS ? row->heads : COLUMNS;
    for (int64_t a = 0; a < hand->n_atoms; a += hand->width) {
        for (int64_t c = 0; c < row->heads; c += most) {
            int64_t atoms = hand->n_atoms - a, columns = row->heads - c;
            if (atoms > hand->width) atoms = hand->width;
            if (columns > most) columns = most;
            tile t = {.order = order_of(hand, atoms < hand->width || columns < most, atoms, columns),
                      .atoms = hand->atoms + a,
                      .from_column = into ? row->head_stride : s->payload_column,
                      .to_column = into ? s->payload_column : row->head_stride,
                      .way = hand->way};
            t.from = s->from + c * t.from_column;
            t.to = s->to + c * t.to_column;
            push(hand, &t);
        }
    }
}

/* Rows `r` to `end` of part `p`. */
static void copy_rows(hand *hand, const job *job, int64_t p, int64_t r, int64_t end) {
    strip s, before = {0};
    int64_t whole = 0; /* whether the atoms at hand are all of the strip before */
    for (; r < end; r += s.twins) {
        describe(&s, job, p, r, end);
        if (whole && same_atoms(&before, &s)) {
            copy_atoms(hand, &s);
        } else {
            for (int64_t t = 0; t < s.part->tokens;) {
                push(hand, NULL); /* it may use the atoms */
                whole = t == 0;
                t = cut(hand, &s, t);
                survey(hand, &s);
                copy_atoms(hand, &s);
            }
        }
        before = s;
    }
    push(hand, NULL);
}

static void *work(void *given) {
    job *job = given;
    hand hand;
    hand.manner = manner_here();
    hand.streaming = job->streaming;
    hand.busy = 0;
    hand.n_atoms = 0;
    hand.orders[0].atoms = hand.orders[1].atoms = 0; /* not made yet */
    for (;;) {
        int64_t item = atomic_fetch_add(&job->next, 1);
        if (item >= job->plan->n_parts * job->groups) break;
        int64_t first = item % job->groups * job->rows, end = first + job->rows;
        copy_rows(&hand, job, item / job->groups, first, end < job->plan->n_rows ? end : job->plan->n_rows);
    }
#if LMKV_STREAMING
    _mm_sfence(); /* streamed bytes are seen before whatever the caller does next */
#endif
    return NULL;
}

void lmkv_copy(uint64_t to, uint64_t from, int64_t bytes) {
    char *target = (char *)(uintptr_t)to;
    const char *source = (const char *)(uintptr_t)from;
    if (bytes < LMKV_STREAM_TOTAL) {
        memcpy(target, source, (size_t)bytes);
        return;
    }
    put_lines(target, source, (size_t)bytes);
#if LMKV_STREAMING
    _mm_sfence();
#endif
}

int64_t lmkv_host_copy(const lmkv_plan *plan, int into_payloads, int threads, char *why, size_t room) {
    int64_t total = lmkv_check(plan, why, room);
    if (total <= 0) return total;
    job job = {.plan = plan, .into_payloads = into_payloads, .streaming = total >= LMKV_STREAM_TOTAL};
    job.rows = threads > 1 && plan->n_rows > ROWS ? ROWS : plan->n_rows;
    job.groups = (plan->n_rows + job.rows - 1) / job.rows;
    atomic_init(&job.next, 0);
    pthread_t others[MOST_THREADS];
    int started = 0;
    while (started < threads - 1 && started < MOST_THREADS && started < job.groups * plan->n_parts - 1 &&
           pthread_create(&others[started], NULL, work, &job) == 0)
        started++;
    work(&job); /* does what threads that could not be started would have done */
    for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
    return total;
}
