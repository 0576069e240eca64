/* What the files of the GPU half share. */
#ifndef LMKV_GPU_H
#define LMKV_GPU_H

#include <pthread.h>

#include "driver.h"
#include "plan.h"

enum { MOST_ENTRIES = 16, WIDTHS = 5 };

typedef struct {
    uint64_t address;
    size_t bytes;
} pinned_range;

/* Staging memory of one direction: entries used in turn. One stream moves them over the wire, one behind the other, another one
 * works on those that are there: the wire rests for neither. With two streams that both do both, four of them shared the wire where
 * both directions ran, and more were slower still (docs/benchmarks.md). */
typedef struct {
    gpu_address base;
    int64_t entry_bytes;
    int64_t wanted_bytes; /* what the options said when it was made */
    int64_t entries;
    int64_t next;
    gpu_stream wire, work;
    gpu_event moved[MOST_ENTRIES], worked[MOST_ENTRIES]; /* what was last done with each entry */
} staging_ring;

struct lmkv_gpu {
    const gpu_driver *driver;
    gpu_device device;
    gpu_context context;
    gpu_function kernels[2][WIDTHS]; /* [into payloads][log2 of the vector's bytes] */
    gpu_function fetch;
    lmkv_gpu_options options;
    pthread_mutex_t lock; /* guards everything below */
    staging_ring rings[2]; /* [into payloads] */
    lmkv_gpu_copy *spare;
    pinned_range *pinned; /* by address */
    size_t n_pinned, room_pinned;
};

/* Of kernels.cu. */
typedef struct {
    uint64_t payload;
    uint32_t held, first, tokens, at;
} gpu_job;

struct lmkv_gpu_copy {
    lmkv_gpu *gpu;
    lmkv_gpu_copy *next;  /* among spare ones */
    char *host_table;     /* rows, places and jobs, pinned */
    gpu_address table;    /* and where the device finds them */
    size_t table_bytes;
    gpu_event start;      /* what was in the caller's stream */
    gpu_event finished;
    gpu_event *group_done;
    int64_t *ends; /* last row + 1 of each group */
    int64_t groups, room_groups;
    int into_payloads;
    int is_done;
};

/* 0 or -1 with a message of what the driver said to `what`. */
int gpu_failed(gpu_status status, const char *what, char *why, size_t room);

/* The pinned range that holds all of that memory, -1 if none does. Under the lock. */
int64_t gpu_pinned_range(const lmkv_gpu *gpu, uint64_t address, size_t bytes);

/* A ring whose entries hold at least so many bytes. Under the lock. */
int gpu_ring_ready(lmkv_gpu *gpu, int into_payloads, int64_t entry_bytes, char *why, size_t room);

/* A copy with room for a table of so many bytes and for groups, from the spare ones if there is one. Under the lock. */
lmkv_gpu_copy *gpu_copy_new(lmkv_gpu *gpu, size_t table_bytes, int64_t groups, char *why, size_t room);

/* Make the GPU's context current, and undo that. */
int gpu_enter(lmkv_gpu *gpu, char *why, size_t room);
void gpu_leave(lmkv_gpu *gpu);

#endif
