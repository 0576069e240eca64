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

/* Version of this interface. */
int lmkv_version(void);
