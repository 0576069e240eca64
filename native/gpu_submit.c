/* How a copy is made. Rows of a chunk that lie together in its payload cross the wire in one large transfer, between host memory
 * and an entry of a staging ring in the device's memory; a kernel scatters or gathers there, at the speed of the device's memory.
 * So the engine's block size does not matter to the wire. What needs only few tokens of a chunk, and small copies, are one kernel
 * on pinned host memory: it moves nothing that was not asked for, and has no second step to wait for. */
#include "gpu.h"

#include <stdlib.h>
#include <string.h>

enum { PER_THREAD = 2 }; /* of kernels.cu: vectors of a thread in a tile */
static const int64_t MOST_PITCH = INT32_MAX;

/* One kernel launch, and the transfers before or after it. */
typedef struct {
    int64_t row, rows;
    int64_t job, jobs;
    int64_t bytes; /* of staging memory; 0 for a kernel on pinned host memory */
    int64_t group; /* ends with this piece, or -1 */
    int merge;     /* the payloads' other tokens must stay: bring them into the staging memory first */
} piece;

typedef struct {
    lmkv_gpu *gpu;
    const lmkv_plan *plan;
    int into_payloads;
    const int64_t *ends;
    int64_t groups;
    char *direct;  /* by part: by a kernel on pinned host memory */
    char *partial; /* by part: some of its tokens are not copied */
    piece *pieces;
    int64_t n_pieces, room_pieces;
    gpu_job *jobs;
    int64_t *job_part;
    int64_t n_jobs, room_jobs;
    int64_t largest; /* bytes of staging memory of any piece */
    int hurry;       /* whether the next kernel is waited for */
    char *why;
    size_t room;
} submission;

static int64_t row_end(const lmkv_row *row) { return row->offset + row->heads * row->run; }

/* Bytes of rows [first, last) of a part's payload. */
static int64_t share(const submission *s, int64_t part, int64_t first, int64_t last) {
    const lmkv_row *rows = s->plan->rows;
    return (row_end(&rows[last - 1]) - rows[first].offset) * s->plan->parts[part].held;
}

/* -- planning ---------------------------------------------------------------------------------------------------------- */

static int add_piece(submission *s, piece new_piece) {
    if (s->n_pieces == s->room_pieces) {
        int64_t more = s->room_pieces ? 2 * s->room_pieces : 64;
        piece *grown = realloc(s->pieces, (size_t)more * sizeof *grown);
        if (!grown) return (int)lmkv_refuse(s->why, s->room, "expected memory for a plan of %lld pieces; there is none", (long long)more);
        s->pieces = grown;
        s->room_pieces = more;
    }
    s->pieces[s->n_pieces++] = new_piece;
    if (new_piece.bytes > s->largest) s->largest = new_piece.bytes;
    return 0;
}

static int add_job(submission *s, int64_t part) {
    if (s->n_jobs == s->room_jobs) {
        int64_t more = s->room_jobs ? 2 * s->room_jobs : 64;
        gpu_job *jobs = realloc(s->jobs, (size_t)more * sizeof *jobs);
        if (jobs) s->jobs = jobs;
        int64_t *parts = realloc(s->job_part, (size_t)more * sizeof *parts);
        if (parts) s->job_part = parts;
        if (!jobs || !parts) return (int)lmkv_refuse(s->why, s->room, "expected memory for %lld jobs; there is none", (long long)more);
        s->room_jobs = more;
    }
    const lmkv_part *from = &s->plan->parts[part];
    s->jobs[s->n_jobs] = (gpu_job){0, (uint32_t)from->held, (uint32_t)from->first, (uint32_t)from->tokens, (uint32_t)from->at};
    s->job_part[s->n_jobs++] = part;
    return 0;
}

/* A part that is larger than an entry: pieces of as many rows as fit, about equally large. */
static int split_part(submission *s, int64_t part, int64_t first, int64_t last) {
    int64_t whole = share(s, part, first, last), entry = s->gpu->options.entry_bytes;
    int64_t target = whole / ((whole + entry - 1) / entry) + 1;
    for (int64_t row = first; row < last;) {
        int64_t end = row + 1;
        while (end < last && share(s, part, row, end) < target && share(s, part, row, end + 1) <= entry) end++;
        piece next = {row, end - row, s->n_jobs, 1, share(s, part, row, end), -1, s->into_payloads && s->partial[part]};
        if (add_job(s, part) || add_piece(s, next)) return -1;
        row = end;
    }
    return 0;
}

static int plan_group(submission *s, int64_t group) {
    int64_t first = group ? s->ends[group - 1] : 0, last = s->ends[group], entry = s->gpu->options.entry_bytes;
    int64_t before = s->n_pieces;
    piece direct = {first, last - first, s->n_jobs, 0, 0, -1, 0};
    for (int64_t part = 0; part < s->plan->n_parts; part++) {
        if (!s->direct[part] || !s->plan->parts[part].tokens) continue;
        if (add_job(s, part)) return -1;
        direct.jobs++;
    }
    if (direct.jobs && add_piece(s, direct)) return -1;
    piece open = {0};
    for (int64_t part = 0; part < s->plan->n_parts; part++) {
        if (s->direct[part] || !s->plan->parts[part].tokens) continue;
        int64_t bytes = share(s, part, first, last);
        int merge = s->into_payloads && s->partial[part];
        if (open.jobs && (open.bytes + bytes > entry || open.merge != merge)) {
            if (add_piece(s, open)) return -1;
            open.jobs = 0;
        }
        if (bytes > entry) {
            if (split_part(s, part, first, last)) return -1;
            continue;
        }
        if (!open.jobs) open = (piece){first, last - first, s->n_jobs, 0, 0, -1, merge};
        if (add_job(s, part)) return -1;
        open.jobs++;
        open.bytes += bytes;
    }
    if (open.jobs && add_piece(s, open)) return -1;
    if (s->n_pieces > before) s->pieces[s->n_pieces - 1].group = group;
    return 0;
}

/* Which parts a kernel reads or writes in host memory itself: those of small copies, and those of which little is wanted. */
static void choose_paths(submission *s, int64_t total) {
    const lmkv_plan *plan = s->plan;
    for (int64_t p = 0; p < plan->n_parts; p++) {
        const lmkv_part *part = &plan->parts[p];
        int64_t skipped = 0;
        for (int64_t table = 0; table < plan->tables; table++) {
            const lmkv_place *places = plan->places + table * plan->n_places + part->at;
            int32_t gone = 0;
            for (int64_t t = 0; t < part->tokens; t++) gone += places[t].block < 0;
            skipped += gone;
        }
        s->partial[p] = part->tokens < part->held || skipped;
        int little = total <= s->gpu->options.direct_bytes || 4 * part->tokens <= part->held || (s->into_payloads && s->partial[p]);
        s->direct[p] = little && gpu_pinned_range(s->gpu, part->payload, (size_t)share(s, p, 0, plan->n_rows)) >= 0;
    }
}

static int check(const submission *s) {
    const lmkv_plan *plan = s->plan;
    for (int64_t r = 1; r < plan->n_rows; r++) {
        if (plan->rows[r].offset != row_end(&plan->rows[r - 1]))
            return (int)lmkv_refuse(s->why, s->room, "row %lld: expected it to follow row %lld in the payload, at %lld; got %lld", (long long)r,
                                    (long long)r - 1, (long long)row_end(&plan->rows[r - 1]), (long long)plan->rows[r].offset);
    }
    for (int64_t p = 0; p < plan->n_parts; p++) {
        for (int64_t r = 0; r < plan->n_rows; r++) {
            if (plan->rows[r].heads * plan->rows[r].run * plan->parts[p].held > INT32_MAX)
                return (int)lmkv_refuse(s->why, s->room, "part %lld, row %lld: expected less than 2 GiB; got %lld bytes", (long long)p,
                                        (long long)r, (long long)(plan->rows[r].heads * plan->rows[r].run * plan->parts[p].held));
        }
    }
    for (int64_t g = 0; g < s->groups; g++) {
        int64_t before = g ? s->ends[g - 1] : 0;
        if (s->ends[g] <= before || s->ends[g] > plan->n_rows || (g == s->groups - 1 && s->ends[g] != plan->n_rows))
            return (int)lmkv_refuse(s->why, s->room, "expected ascending ends of groups up to %lld rows; got %lld after %lld",
                                    (long long)plan->n_rows, (long long)s->ends[g], (long long)before);
    }
    return 0;
}

/* -- submitting -------------------------------------------------------------------------------------------------------- */

static gpu_status transfer(const submission *s, uint64_t host, gpu_address device, int64_t bytes, int to_device, gpu_stream stream) {
    const gpu_driver *driver = s->gpu->driver;
    if (to_device) return driver->to_device(device, (const void *)(uintptr_t)host, (size_t)bytes, stream);
    return driver->to_host((void *)(uintptr_t)host, device, (size_t)bytes, stream);
}

static gpu_status transfer_lines(const submission *s, uint64_t host, int64_t pitch, gpu_address device, int64_t bytes, int64_t lines,
                                 int to_device, gpu_stream stream) {
    gpu_copy_2d copy;
    memset(&copy, 0, sizeof copy);
    copy.width = (size_t)bytes;
    copy.height = (size_t)lines;
    if (to_device) {
        copy.src_type = GPU_HOST;
        copy.src_host = (const void *)(uintptr_t)host;
        copy.src_pitch = (size_t)pitch;
        copy.dst_type = GPU_DEVICE;
        copy.dst_device = device;
        copy.dst_pitch = (size_t)bytes;
    } else {
        copy.src_type = GPU_DEVICE;
        copy.src_device = device;
        copy.src_pitch = (size_t)bytes;
        copy.dst_type = GPU_HOST;
        copy.dst_host = (void *)(uintptr_t)host;
        copy.dst_pitch = (size_t)pitch;
    }
    return s->gpu->driver->copy_2d(&copy, stream);
}

/* Where a job's rows begin in its payload. */
static uint64_t host_address(const submission *s, int64_t job, int64_t row) {
    const lmkv_part *part = &s->plan->parts[s->job_part[job]];
    return part->payload + (uint64_t)(part->held * s->plan->rows[row].offset);
}

/* Jobs from `job` on that one transfer of equal lines moves: as long, as far apart, in one pinned range. */
static int64_t lines_from(const submission *s, const piece *p, int64_t job, int64_t bytes, int64_t *pitch) {
    int64_t last = p->job + p->jobs, lines = 1, whole = share(s, s->job_part[job], 0, s->plan->n_rows);
    *pitch = bytes;
    int64_t range = gpu_pinned_range(s->gpu, s->plan->parts[s->job_part[job]].payload, (size_t)whole);
    if (range < 0) return 1;
    while (job + lines < last) {
        int64_t part = s->job_part[job + lines];
        int64_t step = (int64_t)(host_address(s, job + lines, p->row) - host_address(s, job + lines - 1, p->row));
        if (share(s, part, p->row, p->row + p->rows) != bytes || step < bytes || step > MOST_PITCH || (lines > 1 && step != *pitch) ||
            gpu_pinned_range(s->gpu, s->plan->parts[part].payload, (size_t)whole) != range)
            break;
        *pitch = step;
        lines++;
    }
    return lines;
}

static gpu_status transfer_piece(const submission *s, const piece *p, int to_device, gpu_stream stream) {
    for (int64_t job = p->job; job < p->job + p->jobs;) {
        int64_t bytes = share(s, s->job_part[job], p->row, p->row + p->rows), pitch;
        int64_t lines = lines_from(s, p, job, bytes, &pitch);
        uint64_t host = host_address(s, job, p->row);
        gpu_status status = lines > 1 ? transfer_lines(s, host, pitch, s->jobs[job].payload, bytes, lines, to_device, stream)
                                      : transfer(s, host, s->jobs[job].payload, bytes, to_device, stream);
        if (status) return status;
        job += lines;
    }
    return 0;
}

/* log2 of the widest vector that everything of a piece is a multiple of. */
static int vector_width(const submission *s, const piece *p) {
    uint64_t all = 16;
    for (int64_t r = p->row; r < p->row + p->rows; r++) {
        const lmkv_row *row = &s->plan->rows[r];
        all |= row->base | (uint64_t)row->block_stride | (uint64_t)row->token_stride | (uint64_t)row->head_stride | (uint64_t)row->run;
    }
    for (int64_t job = p->job; job < p->job + p->jobs; job++) all |= s->jobs[job].payload;
    int width = 0;
    while (width < WIDTHS - 1 && !(all & ((uint64_t)1 << width))) width++;
    return width;
}

/* Transfers lose a tenth beside kernels that use all of the device's memory bandwidth (seen on an H200): only those that somebody
 * waits for, or that nothing is transferred beside, are in a hurry. */
static gpu_status launch(const submission *s, const piece *p, const lmkv_gpu_copy *copy, gpu_stream stream) {
    const lmkv_plan *plan = s->plan;
    const lmkv_gpu_options *options = &s->gpu->options;
    int width = vector_width(s, p);
    int64_t tiles = 1, tile = PER_THREAD * options->threads;
    for (int64_t job = p->job; job < p->job + p->jobs; job++) {
        for (int64_t r = p->row; r < p->row + p->rows; r++) {
            int64_t vectors = plan->rows[r].heads * s->jobs[job].tokens * (plan->rows[r].run >> width);
            if ((vectors + tile - 1) / tile > tiles) tiles = (vectors + tile - 1) / tile;
        }
    }
    gpu_address rows = copy->table + (uint64_t)p->row * sizeof(lmkv_row);
    gpu_address places = copy->table + (uint64_t)plan->n_rows * sizeof(lmkv_row);
    gpu_address jobs = places + (uint64_t)(plan->tables * plan->n_places) * sizeof(lmkv_place) + (uint64_t)p->job * sizeof(gpu_job);
    uint32_t n_rows = (uint32_t)p->rows, n_places = (uint32_t)plan->n_places, n_jobs = (uint32_t)p->jobs, n_tiles = (uint32_t)tiles;
    void *arguments[] = {&rows, &n_rows, &places, &n_places, &jobs, &n_jobs, &n_tiles};
    int64_t blocks = p->jobs * p->rows * tiles, most = s->hurry ? options->thread_blocks : options->beside_blocks;
    if (blocks > most) blocks = most;
    return s->gpu->driver->launch(s->gpu->kernels[s->into_payloads][width], (unsigned)blocks, 1, 1, (unsigned)options->threads, 1, 1, 0,
                                  stream, arguments, NULL);
}

/* Give every job its place: an entry of the ring, used in turn, or its payload itself. */
static void place_jobs(submission *s, const staging_ring *ring) {
    int64_t entry = ring->next;
    for (int64_t i = 0; i < s->n_pieces; i++) {
        const piece *p = &s->pieces[i];
        gpu_address at = ring->base + (uint64_t)(entry * ring->entry_bytes);
        for (int64_t job = p->job; job < p->job + p->jobs; job++) {
            s->jobs[job].payload = p->bytes ? at : host_address(s, job, p->row);
            at += (uint64_t)share(s, s->job_part[job], p->row, p->row + p->rows);
        }
        if (p->bytes) entry = (entry + 1) % ring->entries;
    }
}

/* Bytes of rows, places and jobs as the device finds them, one behind the other. */
static size_t table_bytes(const submission *s) {
    return (size_t)s->plan->n_rows * sizeof(lmkv_row) + (size_t)(s->plan->tables * s->plan->n_places) * sizeof(lmkv_place) +
           (size_t)s->n_jobs * sizeof(gpu_job);
}

static void fill_table(const submission *s, char *table) {
    const lmkv_plan *plan = s->plan;
    size_t rows = (size_t)plan->n_rows * sizeof(lmkv_row), places = (size_t)(plan->tables * plan->n_places) * sizeof(lmkv_place);
    memcpy(table, plan->rows, rows);
    if (places) memcpy(table + rows, plan->places, places);
    if (s->n_jobs) memcpy(table + rows + places, s->jobs, (size_t)s->n_jobs * sizeof(gpu_job));
}

/* Before a copy's first kernel: its table is on the device, and what was in the caller's stream has run. Fetched by a kernel: a
 * transfer would stand behind whole entries that other copies move. */
static gpu_status before_kernels(const submission *s, lmkv_gpu_copy *copy, gpu_stream stream) {
    const gpu_driver *driver = s->gpu->driver;
    uint64_t from = (uint64_t)(uintptr_t)copy->host_table;
    uint32_t words = (uint32_t)((table_bytes(s) + 15) / 16);
    void *arguments[] = {&copy->table, &from, &words};
    unsigned threads = 256, blocks = (words + threads - 1) / threads;
    gpu_status status = driver->launch(s->gpu->fetch, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, NULL);
    return status ? status : driver->stream_wait(stream, copy->start, 0);
}

/* What a copy has made of its streams so far. */
typedef struct {
    int begun, staged; /* any kernel, any transfer */
} progress;

static gpu_status submit_piece(const submission *s, const piece *p, lmkv_gpu_copy *copy, staging_ring *ring, progress *made) {
    const gpu_driver *driver = s->gpu->driver;
    int64_t entry = ring->next;
    gpu_status status = 0;
    if (p->bytes && (p->merge || !s->into_payloads)) {
        status = driver->stream_wait(ring->wire, ring->worked[entry], 0);
        if (!status) status = transfer_piece(s, p, 1, ring->wire);
        if (!status) status = driver->event_record(ring->moved[entry], ring->wire);
    }
    if (!status && !made->begun) status = before_kernels(s, copy, ring->work);
    made->begun = 1;
    if (!p->bytes) return status ? status : launch(s, p, copy, ring->work);
    if (!status) status = driver->stream_wait(ring->work, ring->moved[entry], 0);
    if (!status) status = launch(s, p, copy, ring->work);
    if (!status) status = driver->event_record(ring->worked[entry], ring->work);
    if (!status && s->into_payloads) {
        status = driver->stream_wait(ring->wire, ring->worked[entry], 0);
        if (!status) status = transfer_piece(s, p, 0, ring->wire);
        if (!status) status = driver->event_record(ring->moved[entry], ring->wire);
    }
    ring->next = (entry + 1) % ring->entries;
    made->staged = 1;
    return status;
}

/* Record an event that has happened once all that was submitted has run. A load ends with kernels, a store with transfers, each of
 * which has waited for its kernel and so for all before it: in a group, those on host memory come first. */
static gpu_status record_all(const submission *s, const staging_ring *ring, const progress *made, gpu_event event) {
    return s->gpu->driver->event_record(event, s->into_payloads && made->staged ? ring->wire : ring->work);
}

static gpu_status submit(submission *s, lmkv_gpu_copy *copy, uint64_t caller) {
    const gpu_driver *driver = s->gpu->driver;
    staging_ring *ring = &s->gpu->rings[s->into_payloads];
    progress made = {0, 0};
    place_jobs(s, ring);
    fill_table(s, copy->host_table);
    gpu_status status = driver->event_record(copy->start, (gpu_stream)(uintptr_t)caller);
    int64_t group = 0;
    for (int64_t i = 0; !status && i < s->n_pieces; i++) {
        const piece *p = &s->pieces[i];
        s->hurry = !p->bytes || i == 0 || i == s->n_pieces - 1 || (copy->groups > 1 && group == 0);
        status = submit_piece(s, p, copy, ring, &made);
        if (p->group < 0 || s->into_payloads) continue;
        for (; !status && group <= p->group; group++) status = record_all(s, ring, &made, copy->group_done[group]);
    }
    for (; !status && group < copy->groups; group++) status = record_all(s, ring, &made, copy->group_done[group]);
    if (!status) status = record_all(s, ring, &made, copy->finished);
    if (status) { /* nothing of it may run on unseen */
        driver->stream_sync(ring->wire);
        driver->stream_sync(ring->work);
    }
    return status;
}

static lmkv_gpu_copy *start(submission *s, int64_t total, uint64_t stream) {
    choose_paths(s, total);
    for (int64_t group = 0; group < s->groups; group++) {
        if (plan_group(s, group)) return NULL;
    }
    if (gpu_ring_ready(s->gpu, s->into_payloads, s->largest, s->why, s->room)) return NULL;
    lmkv_gpu_copy *copy = gpu_copy_new(s->gpu, table_bytes(s), s->groups, s->why, s->room);
    if (!copy) return NULL;
    memcpy(copy->ends, s->ends, (size_t)s->groups * sizeof *copy->ends);
    copy->into_payloads = s->into_payloads;
    if (gpu_failed(submit(s, copy, stream), "submitting a copy", s->why, s->room)) {
        copy->is_done = 1;
        copy->next = s->gpu->spare;
        s->gpu->spare = copy;
        return NULL;
    }
    return copy;
}

lmkv_gpu_copy *lmkv_gpu_start(lmkv_gpu *gpu, const lmkv_plan *plan, int into_payloads, const int64_t *ends, int64_t groups,
                              uint64_t stream, char *why, size_t room) {
    int64_t total = lmkv_check(plan, why, room);
    if (total < 0) return NULL;
    if (plan->n_rows < 1 || groups < 1) {
        lmkv_refuse(why, room, "expected at least one row and one group; got %lld and %lld", (long long)plan->n_rows, (long long)groups);
        return NULL;
    }
    submission s = {.gpu = gpu, .plan = plan, .into_payloads = !!into_payloads, .ends = ends, .groups = groups, .why = why, .room = room};
    if (check(&s)) return NULL;
    lmkv_gpu_copy *copy = NULL;
    s.direct = calloc((size_t)plan->n_parts + 1, 2);
    if (!s.direct) {
        lmkv_refuse(why, room, "expected memory for a plan of %lld parts; there is none", (long long)plan->n_parts);
        return NULL;
    }
    s.partial = s.direct + plan->n_parts + 1;
    pthread_mutex_lock(&gpu->lock);
    if (!gpu_enter(gpu, why, room)) {
        copy = start(&s, total, stream);
        gpu_leave(gpu);
    }
    pthread_mutex_unlock(&gpu->lock);
    free(s.direct);
    free(s.pieces);
    free(s.jobs);
    free(s.job_part);
    return copy;
}
