/* The kernels that gather and scatter tokens between payloads and an engine's rows. Includes nothing, so that NVRTC compiles it too;
 * hipcc takes it as it is (never run). The structures are those of lmkv.h and gpu.c. */

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Row {
    u64 base;
    i64 block_stride, token_stride, head_stride, blocks, block_tokens, heads, run, offset, table;
};

struct Place {
    int block, index;
};

/* Where one part's share of the rows stands: in staging memory, or in pinned host memory. */
struct Job {
    u64 payload; /* of the first row of the launch */
    u32 held, first, tokens, at;
};

enum { MOST_THREADS = 1024, PER_THREAD = 2 };

struct alignas(16) Vector16 {
    u64 low, high;
};

/* A launch moves `rows` rows of `jobs` parts. One tile is blockDim.x * PER_THREAD vectors of one row of one part; `tiles` of them are
 * enough for any. Neighbouring threads take neighbouring vectors of a token, then neighbouring tokens: contiguous in the payload,
 * and in the engine's memory for at least a token's run. All loads of a thread are issued before its first store. */
template <typename Vector, bool INTO_PAYLOADS>
__device__ void move(const Row *rows, u32 n_rows, const Place *places, u32 n_places, const Job *jobs, u32 n_jobs, u32 tiles) {
    const i64 first_offset = rows[0].offset;
    const u64 total = (u64)n_jobs * n_rows * tiles;
    for (u64 tile = blockIdx.x; tile < total; tile += gridDim.x) {
        const u32 item = (u32)(tile / tiles), begin = (u32)(tile % tiles) * (blockDim.x * PER_THREAD) + threadIdx.x;
        const Row row = rows[item % n_rows];
        const Job job = jobs[item / n_rows];
        const u32 vectors = (u32)row.run / (u32)sizeof(Vector), count = (u32)row.heads * job.tokens * vectors;
        char *const payload = (char *)job.payload + (row.offset - first_offset) * job.held + (u64)job.first * row.run;
        const Place *const where = places + row.table * n_places + job.at;
        Vector value[PER_THREAD];
        Vector *to[PER_THREAD];
#pragma unroll
        for (int u = 0; u < PER_THREAD; u++) {
            const u32 i = begin + u * blockDim.x;
            to[u] = nullptr;
            if (i < count) {
                const u32 token_and_head = i / vectors, vector = i - token_and_head * vectors;
                const u32 head = token_and_head / job.tokens, token = token_and_head - head * job.tokens;
                const Place place = where[token];
                if (place.block >= 0) {
                    Vector *const theirs = (Vector *)((char *)row.base + place.block * row.block_stride +
                                                      place.index * row.token_stride + head * row.head_stride) + vector;
                    Vector *const mine = (Vector *)(payload + ((u64)head * job.held + token) * row.run) + vector;
                    value[u] = *(INTO_PAYLOADS ? theirs : mine);
                    to[u] = INTO_PAYLOADS ? mine : theirs;
                }
            }
        }
#pragma unroll
        for (int u = 0; u < PER_THREAD; u++) {
            if (to[u]) *to[u] = value[u];
        }
    }
}

/* A copy's table out of pinned host memory, in pieces of 16 bytes. */
extern "C" __global__ void lmkv_fetch(Vector16 *to, const Vector16 *from, u32 words) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < words) to[i] = from[i];
}

#define KERNEL(name, type, into)                                                                                          \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)                                                                \
        name(const Row *rows, u32 n_rows, const Place *places, u32 n_places, const Job *jobs, u32 n_jobs, u32 tiles) {    \
        move<type, into>(rows, n_rows, places, n_places, jobs, n_jobs, tiles);                                            \
    }

KERNEL(lmkv_gather_1, unsigned char, true)
KERNEL(lmkv_gather_2, unsigned short, true)
KERNEL(lmkv_gather_4, u32, true)
KERNEL(lmkv_gather_8, u64, true)
KERNEL(lmkv_gather_16, Vector16, true)
KERNEL(lmkv_scatter_1, unsigned char, false)
KERNEL(lmkv_scatter_2, unsigned short, false)
KERNEL(lmkv_scatter_4, u32, false)
KERNEL(lmkv_scatter_8, u64, false)
KERNEL(lmkv_scatter_16, Vector16, false)
