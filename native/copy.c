/* Host copies. What they cost is the memory's time, and that depends on order. Measured on a Xeon (Sapphire Rapids) with 300 MB and
 * runs of 256 bytes, one large memcpy = 1: memcpy of each run 0.38 to 0.46, since that reads every line that it is about to
 * overwrite; streaming stores, one place after the other, 0.69 to 0.77; streaming stores while what comes next is fetched from
 * eight places in turn, some KiB apart, 0.95 to 1.05. So a copy is cut into tiles: atoms (short runs of bytes, the same for
 * all heads) times columns (heads). A tile is written in an order of its own while the next one's sources are fetched in theirs,
 * line by line. How large tiles are, and from how many places bytes come in turn, is another matter for each processor: what is
 * best on one costs another a third (docs/benchmarks.md). So the first megabytes are copied in each way, and what was quickest stays. */
#include "lines.h"
#include "plan.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

enum {
    LONGEST = 8 << 10, /* bytes of an atom, about, however many there are */
    ELEMENTS = 512,    /* most atoms times columns of a tile */
    COLUMNS = 64,      /* most of them that are heads */
    ATOMS = 2048,      /* cut at a time */
    ROWS = 8,          /* that a thread takes at a time; even, so that K and V stay together */
    MOST_THREADS = 64
};
/* Set otherwise where tests are to go all ways. */
#ifndef LMKV_TRIES
#define LMKV_TRIES 4 /* of each manner and direction */
#endif
#ifndef LMKV_TRIED
#define LMKV_TRIED (512 << 10) /* bytes: what takes less time tells little */
#endif
#ifndef LMKV_STREAM_TOTAL
#define LMKV_STREAM_TOTAL (4 << 20) /* bytes: a smaller copy fits the caches and is wanted in them */
#endif

/* Bytes copied at one place before going to the next; from and to how many places in turn; bytes of a tile, about: sources are
 * fetched that far ahead; whether into the first cache. */
typedef struct {
    int64_t step, reading, writing, tile;
    int near;
} manner;

static const manner MANNERS[] = {
    {512, 2, 2, 32 << 10, 1}, /* the best of these on an EPYC of Zen 5 */
    {512, 3, 1, 64 << 10, 0}, /* Zen 3 */
    {256, 8, 8, 64 << 10, 0}, /* Sapphire Rapids */
};
enum { N_MANNERS = sizeof MANNERS / sizeof *MANNERS };

/* By direction: how many times one was tried, and the most bytes a microsecond that each was seen to copy. Others on the machine only
 * take away from that. */
static struct {
    atomic_int tries;
    atomic_llong most[N_MANNERS];
} seen[2];

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
    int64_t copied; /* bytes */
    tile now;
    /* of the atoms: */
    int64_t n_atoms, width, columns, from_group, to_group, bytes;
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

static inline const char *source(const tile *t, element e) { return t->from + t->atoms[e.atom].from + e.column * t->from_column; }

/* Copy one tile and fetch the next one's sources meanwhile, a line of each in turn: either in a bunch leaves the memory idle. */
static LMKV_INLINE void copy_tile_by(const tile *now, const tile *next, int near) {
    int64_t n = now->order->atoms * now->order->columns;
    int64_t ahead = next && next->way != CACHED ? next->order->atoms * next->order->columns : 0;
    for (int64_t i = 0; i < n || i < ahead; i++) {
        const char *soon = NULL;
        int64_t fetched = 0, wanted = 0;
        if (i < ahead) {
            element e = next->order->reading[i];
            soon = source(next, e);
            wanted = next->atoms[e.atom].bytes;
        }
        if (i < n) {
            element e = now->order->writing[i];
            const atom *a = &now->atoms[e.atom];
            const char *from = source(now, e);
            char *to = now->to + a->to + e.column * now->to_column;
            if (now->way == LINES && (((uintptr_t)to | (uintptr_t)a->bytes) & (LINE - 1)) == 0) {
                for (int64_t at = 0; at < a->bytes; at += LINE) {
                    if (fetched < wanted) fetch(soon + fetched, near);
                    fetched += LINE;
                    put_line(to + at, from + at);
                }
            } else if (now->way == LINES) {
                put_lines(to, from, (size_t)a->bytes);
            } else if (now->way == SIXTEENS) {
                put_sixteens(to, from, (size_t)a->bytes);
            } else {
                memcpy(to, from, (size_t)a->bytes);
            }
        }
        for (; fetched < wanted; fetched += LINE) fetch(soon + fetched, near);
    }
}

static void copy_tile(const tile *now, const tile *next, const manner *manner) {
    if (manner->near)
        copy_tile_by(now, next, 1);
    else
        copy_tile_by(now, next, 0);
}

/* Hand over the next tile; null: none, finish. */
static void push(hand *hand, const tile *next) {
    if (hand->busy) copy_tile(&hand->now, next, hand->manner);
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
    int64_t bytes = 0, shared = 0;
    uintptr_t column = (uintptr_t)(s->into_payloads ? s->payload_column : row->head_stride);
    for (int64_t i = 0; i < hand->n_atoms; i++) {
        bytes += hand->atoms[i].bytes;
        shared += (((uintptr_t)s->to + (uintptr_t)hand->atoms[i].to) | (uintptr_t)hand->atoms[i].bytes | column) % LINE != 0;
    }
    hand->way = !hand->streaming ? CACHED : shared * 32 <= hand->n_atoms ? LINES : SIXTEENS;
    int64_t row_group = group(hand, s), tile = hand->manner->tile, most = COLUMNS;
    if (row_group < hand->n_atoms) { /* heads lie apart: whole groups of few, since all of them begin at the same place of a page */
        int64_t grouped = bytes / hand->n_atoms * row_group;
        if (grouped && (tile + grouped - 1) / grouped < most) most = (tile + grouped - 1) / grouped;
    }
    int64_t turns = (row->heads + most - 1) / most, columns = (row->heads + turns - 1) / turns;
    hand->columns = columns;
    hand->from_group = s->into_payloads ? row_group : ATOMS; /* in a payload a head's tokens are one run */
    hand->to_group = s->into_payloads ? ATOMS : row_group;
    hand->bytes = bytes * row->heads;
    int64_t tiles = (bytes * columns + tile / 2) / tile; /* of one size, as far as can be */
    int64_t width = tiles > 1 ? (hand->n_atoms + tiles - 1) / tiles : hand->n_atoms;
    if (width > ELEMENTS / columns) width = ELEMENTS / columns;
    if (width > row_group) width -= width % row_group;
    hand->width = width < 1 ? 1 : width;
}

/* Copy the atoms that were cut, of all heads. */
static void copy_atoms(hand *hand, const strip *s) {
    const lmkv_row *row = s->row;
    int into = s->into_payloads;
    hand->copied += hand->bytes;
    for (int64_t a = 0; a < hand->n_atoms; a += hand->width) {
        for (int64_t c = 0; c < row->heads; c += hand->columns) {
            int64_t atoms = hand->n_atoms - a, columns = row->heads - c;
            if (atoms > hand->width) atoms = hand->width;
            if (columns > hand->columns) columns = hand->columns;
            tile t = {.order = order_of(hand, atoms < hand->width || columns < hand->columns, atoms, columns),
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

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The next one to be tried, or the quickest. */
static int manner_for(int direction, int *tried) {
    int tries = atomic_load(&seen[direction].tries), best = 0;
    *tried = tries < LMKV_TRIES * N_MANNERS;
    if (*tried) return tries % N_MANNERS;
    for (int m = 1; m < N_MANNERS; m++)
        if (atomic_load(&seen[direction].most[m]) > atomic_load(&seen[direction].most[best])) best = m;
    return best;
}

static void note(int direction, int manner, int64_t bytes, int64_t took) {
    if (bytes < LMKV_TRIED) return;
    atomic_fetch_add(&seen[direction].tries, 1);
    long long speed = bytes * 1000 / (took > 0 ? took : 1), before = atomic_load(&seen[direction].most[manner]);
    while (before < speed && !atomic_compare_exchange_weak(&seen[direction].most[manner], &before, speed)) continue;
}

static void *work(void *given) {
    job *job = given;
    hand hand;
    hand.manner = NULL;
    hand.streaming = job->streaming;
    hand.busy = 0;
    hand.n_atoms = 0;
    for (;;) {
        int64_t item = atomic_fetch_add(&job->next, 1);
        if (item >= job->plan->n_parts * job->groups) break;
        int64_t first = item % job->groups * job->rows, end = first + job->rows;
        int tried = 0, chosen = job->streaming ? manner_for(job->into_payloads, &tried) : 0;
        if (hand.manner != &MANNERS[chosen]) hand.orders[0].atoms = hand.orders[1].atoms = 0; /* not made yet */
        hand.manner = &MANNERS[chosen];
        hand.copied = 0;
        int64_t begun = tried ? nanoseconds() : 0;
        copy_rows(&hand, job, item / job->groups, first, end < job->plan->n_rows ? end : job->plan->n_rows);
        if (tried) note(job->into_payloads, chosen, hand.copied, nanoseconds() - begun);
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
