/* The C interface of LMKV: raw pointers in, no Python, no torch.
 *
 * This file holds no preprocessor lines, because cffi reads it too. Include <stdint.h> and <stddef.h> before it.
 *
 * A copy moves tokens between payloads (chunks in host memory, docs/format.md) and an engine's KV memory. It is described by
 * strides, so every engine's layout is one plan. Strides and offsets are in bytes; strides may be negative. */

/* One row: a layer's K, V or latent in the engine's memory. Token `index` of block `block`, head h, is `run` contiguous bytes at
 * base + block * block_stride + index * token_stride + h * head_stride. */
typedef struct {
    uint64_t base;
    int64_t block_stride;
    int64_t token_stride;
    int64_t head_stride;
    int64_t blocks;       /* how many there are */
    int64_t block_tokens; /* tokens in a block */
    int64_t heads;
    int64_t run;
    int64_t offset; /* of the row in a payload of one token; in one of n tokens it starts at n * offset */
    int64_t table;  /* which of the plan's block tables names its blocks */
} lmkv_row;

/* Tokens of one chunk. Row r, head h, token j of the payload is at payload + held * r.offset + (h * held + j) * r.run. */
typedef struct {
    uint64_t payload;
    int64_t held;   /* tokens in the payload */
    int64_t first;  /* first one to copy */
    int64_t tokens; /* how many */
    int64_t at;     /* the first one's number in the block tables */
} lmkv_part;

/* Where one token lies in the engine's memory. A negative block: the token is skipped. */
typedef struct {
    int32_t block;
    int32_t index;
} lmkv_place;

typedef struct {
    const lmkv_row *rows;
    int64_t n_rows;
    const lmkv_part *parts;
    int64_t n_parts;
    const lmkv_place *places; /* [tables, n_places] */
    int64_t n_places;
    int64_t tables;
} lmkv_plan;

/* Bytes a valid plan moves, skipped tokens not counted; -1 if it is not valid: `why` says what was expected and what came. */
int64_t lmkv_check(const lmkv_plan *plan, char *why, size_t room);

/* Copy on the host. Source and destination must not overlap. Runs that lie together are joined; large copies go around the caches.
 * `threads` > 1 shares the parts out. Returns as lmkv_check does; of an invalid plan nothing is copied. */
int64_t lmkv_host_copy(const lmkv_plan *plan, int into_payloads, int threads, char *why, size_t room);

/* Copy bytes that do not overlap, many of them around the caches: a third less for the memory to do than where each line is read before
 * it is overwritten. */
void lmkv_copy(uint64_t to, uint64_t from, int64_t bytes);

/* Version of this interface. */
int lmkv_version(void);

/* -- GPUs. Kernels come from an image (fatbin, cubin or PTX of native/kernels.cu); the driver's library is loaded on first use. -- */

/* A GPU with what copies need there: streams, events, a ring of staging memory a direction. Safe to use from several threads. */
typedef struct lmkv_gpu lmkv_gpu;

/* A copy that was submitted. */
typedef struct lmkv_gpu_copy lmkv_gpu_copy;

typedef struct {
    int64_t entry_bytes;  /* of one entry of a staging ring; rows of a chunk that are larger make it grow */
    int64_t entries;      /* of a staging ring, 2 to 16 */
    int64_t thread_blocks; /* of a kernel that somebody waits for, at most */
    int64_t beside_blocks; /* of a kernel beside which the wire is in use, at most */
    int64_t threads;       /* in each, 32 to 1024 */
    int64_t direct_bytes; /* copies of at most so many bytes are one kernel on pinned host memory, without staging */
} lmkv_gpu_options;

/* How many GPUs there are; -1 without a usable driver. */
int lmkv_gpu_count(char *why, size_t room);

/* Compute capability of a device, such as "90". 0 or -1. */
int lmkv_gpu_architecture(int device, char *text, size_t text_room, char *why, size_t room);

/* The image that was built in; null if there was no nvcc. */
const unsigned char *lmkv_gpu_image(size_t *size);

/* Open a device in the calling thread's current context if that is the device's, else in its primary context. Null on failure. */
lmkv_gpu *lmkv_gpu_open(int device, const void *image, char *why, size_t room);

/* Text of one fact: "name" or "pci" (its address on the bus). Returns 0, or -1 for another fact. */
int lmkv_gpu_fact(lmkv_gpu *gpu, const char *fact, char *text, size_t room);

/* Change how copies are made from now on. -1 if a value is out of range. */
int lmkv_gpu_tune(lmkv_gpu *gpu, const lmkv_gpu_options *options, char *why, size_t room);

/* Pin mapped host memory, so that the device reaches it directly. A payload must lie within one pinned range to profit. */
int lmkv_gpu_pin(lmkv_gpu *gpu, uint64_t address, size_t bytes, char *why, size_t room);

/* Undo one call of lmkv_gpu_pin. No copy may be under way there. */
int lmkv_gpu_unpin(lmkv_gpu *gpu, uint64_t address, char *why, size_t room);

/* 1 if that memory lies within one pinned range, else 0. */
int lmkv_gpu_pinned(lmkv_gpu *gpu, uint64_t address, size_t bytes);

/* Submit a copy between payloads in host memory and rows in the device's. It touches rows only after what is in `stream` now.
 * Rows must follow each other in the payload. `ends` are the last rows + 1 of groups of rows, ascending, the last one n_rows: a
 * scatter brings the groups one after the other. Payloads and rows must stay until the copy is done. Null on failure: then
 * nothing is under way. */
lmkv_gpu_copy *lmkv_gpu_start(lmkv_gpu *gpu, const lmkv_plan *plan, int into_payloads, const int64_t *ends, int64_t groups,
                              uint64_t stream, char *why, size_t room);

/* 1 if every byte has arrived, 0 if not yet, -1 if the device failed. */
int lmkv_gpu_done(lmkv_gpu_copy *copy, char *why, size_t room);

/* Block until done; 0, or -1 if the device failed. */
int lmkv_gpu_wait(lmkv_gpu_copy *copy, char *why, size_t room);

/* Have a stream wait, on the device, until a row was scattered, or until all rows were read by a gather. 0 or -1. */
int lmkv_gpu_order(lmkv_gpu_copy *copy, int64_t row, uint64_t stream, char *why, size_t room);

/* Wait until a copy is done and give back what it used; the pointer is dead afterwards. Null is allowed. */
void lmkv_gpu_forget(lmkv_gpu_copy *copy);

/* -- Scanning -- */

/* Fingerprints (docs/format.md, "Content fingerprint") of all windows of `width` tokens; returns how many: n - width + 1, or 0 if the
 * text is shorter than one. `prints` has room for them. */
int64_t lmkv_windows(const uint32_t *tokens, int64_t n, int64_t width, uint64_t seed, uint64_t *prints);
