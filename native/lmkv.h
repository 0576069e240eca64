/* The C interface of LMKV: raw pointers in, no Python, no torch.
 *
 * This file holds no preprocessor lines, because cffi reads it too. Include <stdint.h> and <stddef.h> before it.
 */

/* One strided copy: `heads` x `tokens` contiguous runs of `run` bytes. Strides are in bytes and may be negative.
 * Source and destination must not overlap. */
typedef struct {
    int64_t src;
    int64_t dst;
    int64_t heads;
    int64_t tokens;
    int64_t run;
    int64_t src_head;
    int64_t src_token;
    int64_t dst_head;
    int64_t dst_token;
} lmkv_box;

/* Copy `count` boxes. Runs that lie together are joined. Long runs of a large copy go around the caches.
 * Returns the bytes copied, or -1 - i if box i has a negative size or a null address; nothing is copied then. */
int64_t lmkv_copy(const lmkv_box *boxes, size_t count);

/* Version of this interface. */
int lmkv_version(void);
