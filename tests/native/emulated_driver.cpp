/* A double of the GPU driver, for machines without one: it stands in for libcuda.so.1, never for a part of LMKV.
 *
 * Device memory is host memory. Streams are queues; whenever somebody waits or asks, operations run one by one, the next one taken
 * from a random stream whose first operation may run. So a missing wait between two streams shows as wrong bytes sooner or later,
 * and a wait that nothing satisfies as an error instead of a hang. Kernels are those of native/kernels.cu, thread by thread. */
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <vector>

struct Three {
    unsigned x, y, z;
};
static Three blockIdx, threadIdx, gridDim, blockDim;
#define __global__
#define __device__
#define __launch_bounds__(...)
#include "../../native/kernels.cu"

namespace {

enum { OK = 0, INVALID = 1, NOT_READY = 600, REGISTERED = 712, NOT_REGISTERED = 713 };

struct Event {
    uint64_t recorded = 0, reached = 0;
};

struct Operation {
    Event *event = nullptr; /* to wait for, or to reach */
    uint64_t version = 0;
    bool waits = false;
    std::function<void()> run;
};

using Stream = std::deque<Operation>;

std::recursive_mutex lock;
std::mt19937 dice(1);
std::vector<Stream *> streams;
Stream default_stream;
std::map<uintptr_t, size_t> device_memory, pinned_memory;
int refuse_allocations, refuse_pins;
long launches, transfers, lines;

Stream *stream_of(void *handle) { return handle ? (Stream *)handle : &default_stream; }

bool inside(const std::map<uintptr_t, size_t> &ranges, uintptr_t address, size_t bytes) {
    auto after = ranges.upper_bound(address);
    if (after == ranges.begin()) return false;
    --after;
    return address - after->first + bytes <= after->second;
}

/* Run one operation; false if none can run. */
bool step() {
    std::vector<Stream *> able;
    auto look = [&](Stream *stream) {
        if (!stream->empty() && (!stream->front().waits || stream->front().event->reached >= stream->front().version)) able.push_back(stream);
    };
    look(&default_stream);
    for (Stream *stream : streams) look(stream);
    if (able.empty()) return false;
    Stream *chosen = able[dice() % able.size()];
    Operation operation = std::move(chosen->front());
    chosen->pop_front();
    if (operation.run) operation.run();
    if (operation.event && !operation.waits) operation.event->reached = operation.version;
    return true;
}

int drain(Stream *stream) {
    while (!stream->empty()) {
        if (!step()) {
            fprintf(stderr, "emulated driver: a stream waits for what never comes\n");
            return 999;
        }
    }
    return OK;
}

void push(void *stream, std::function<void()> run) {
    Operation operation;
    operation.run = std::move(run);
    stream_of(stream)->push_back(std::move(operation));
}

} // namespace

#define API extern "C" __attribute__((visibility("default"))) int
#define LOCKED std::lock_guard<std::recursive_mutex> guard(lock)

/* For tests: how operations interleave, and faults. */
extern "C" __attribute__((visibility("default"))) void emulated_seed(unsigned seed) { dice.seed(seed); }
extern "C" __attribute__((visibility("default"))) void emulated_faults(int allocations, int pins) {
    refuse_allocations = allocations;
    refuse_pins = pins;
}
extern "C" __attribute__((visibility("default"))) void emulated_counts(long *out) {
    out[0] = launches;
    out[1] = transfers;
    out[2] = lines;
}

API cuInit(unsigned) { return OK; }
API cuDeviceGetCount(int *count) { return *count = 1, OK; }
API cuDeviceGet(int *device, int ordinal) { return ordinal ? INVALID : (*device = 0, OK); }
API cuDeviceGetName(char *name, int room, int) { return snprintf(name, room, "Emulated"), OK; }
API cuDeviceGetAttribute(int *value, int, int) { return *value = 9, OK; }
API cuDeviceGetPCIBusId(char *text, int room, int) { return snprintf(text, room, "0000:00:00.0"), OK; }
API cuGetErrorString(int status, const char **text) {
    *text = status == INVALID ? "invalid argument" : status == 2 ? "out of memory" : "emulated error";
    return OK;
}
API cuDevicePrimaryCtxRetain(void **context, int) { return *context = (void *)1, OK; }
API cuCtxGetCurrent(void **context) { return *context = nullptr, OK; }
API cuCtxGetDevice(int *device) { return *device = 0, OK; }
API cuCtxPushCurrent_v2(void *) { return OK; }
API cuCtxPopCurrent_v2(void **) { return OK; }
API cuThreadExchangeStreamCaptureMode(int *mode) { return *mode = 0, OK; }
API cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, OK; }

API cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    LOCKED;
    if (refuse_allocations) return 2;
    char *memory = (char *)malloc(bytes);
    memset(memory, 0xD5, bytes);
    device_memory[(uintptr_t)memory] = bytes;
    *address = (uint64_t)(uintptr_t)memory;
    return OK;
}
API cuMemFree_v2(uint64_t address) {
    LOCKED;
    if (!device_memory.erase((uintptr_t)address)) return INVALID;
    free((void *)(uintptr_t)address);
    return OK;
}
API cuMemHostAlloc(void **address, size_t bytes, unsigned) {
    LOCKED;
    *address = malloc(bytes);
    pinned_memory[(uintptr_t)*address] = bytes;
    return OK;
}
API cuMemFreeHost(void *address) {
    LOCKED;
    if (!pinned_memory.erase((uintptr_t)address)) return INVALID;
    free(address);
    return OK;
}
API cuMemHostRegister_v2(void *address, size_t bytes, unsigned) {
    LOCKED;
    if (refuse_pins) return 2;
    if (inside(pinned_memory, (uintptr_t)address, 1)) return REGISTERED;
    pinned_memory[(uintptr_t)address] = bytes;
    return OK;
}
API cuMemHostUnregister(void *address) {
    LOCKED;
    return pinned_memory.erase((uintptr_t)address) ? OK : NOT_REGISTERED;
}
API cuMemHostGetDevicePointer_v2(uint64_t *address, void *host, unsigned) { return *address = (uint64_t)(uintptr_t)host, OK; }

API cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    LOCKED;
    transfers++;
    if (!inside(device_memory, (uintptr_t)to, bytes)) return INVALID;
    if (inside(pinned_memory, (uintptr_t)from, bytes)) {
        push(stream, [=] { memcpy((void *)(uintptr_t)to, from, bytes); });
    } else { /* a driver takes pageable memory along at once */
        std::string taken((const char *)from, bytes);
        push(stream, [=] { memcpy((void *)(uintptr_t)to, taken.data(), bytes); });
    }
    return OK;
}
API cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    LOCKED;
    transfers++;
    if (!inside(device_memory, (uintptr_t)from, bytes)) return INVALID;
    push(stream, [=] { memcpy(to, (void *)(uintptr_t)from, bytes); });
    return inside(pinned_memory, (uintptr_t)to, bytes) ? OK : drain(stream_of(stream));
}

struct Copy2D {
    size_t src_x, src_y;
    int src_type;
    const void *src_host;
    uint64_t src_device;
    void *src_array;
    size_t src_pitch, dst_x, dst_y;
    int dst_type;
    void *dst_host;
    uint64_t dst_device;
    void *dst_array;
    size_t dst_pitch, width, height;
};

API cuMemcpy2DAsync_v2(const Copy2D *given, void *stream) {
    LOCKED;
    transfers++;
    lines += (long)given->height;
    Copy2D copy = *given;
    const char *from = copy.src_type == 1 ? (const char *)copy.src_host : (const char *)(uintptr_t)copy.src_device;
    char *to = copy.dst_type == 1 ? (char *)copy.dst_host : (char *)(uintptr_t)copy.dst_device;
    if (copy.src_pitch < copy.width || copy.dst_pitch < copy.width) return INVALID;
    size_t host_bytes = (copy.src_type == 1 ? copy.src_pitch : copy.dst_pitch) * (copy.height - 1) + copy.width;
    if (!inside(pinned_memory, (uintptr_t)(copy.src_type == 1 ? from : to), host_bytes)) return INVALID;
    push(stream, [=] {
        for (size_t line = 0; line < copy.height; line++) memcpy(to + line * copy.dst_pitch, from + line * copy.src_pitch, copy.width);
    });
    return OK;
}

API cuStreamCreateWithPriority(void **stream, unsigned, int) {
    LOCKED;
    *stream = new Stream;
    streams.push_back((Stream *)*stream);
    return OK;
}
API cuStreamWaitEvent(void *stream, void *event, unsigned) {
    LOCKED;
    Operation operation;
    operation.event = (Event *)event;
    operation.version = ((Event *)event)->recorded;
    operation.waits = true;
    stream_of(stream)->push_back(std::move(operation));
    return OK;
}
API cuStreamSynchronize(void *stream) {
    LOCKED;
    return drain(stream_of(stream));
}
API cuEventCreate(void **event, unsigned) { return *event = new Event, OK; }
API cuEventRecord(void *event, void *stream) {
    LOCKED;
    Operation operation;
    operation.event = (Event *)event;
    operation.version = ++((Event *)event)->recorded;
    stream_of(stream)->push_back(std::move(operation));
    return OK;
}
API cuEventQuery(void *event) {
    LOCKED;
    Event *asked = (Event *)event;
    if (asked->reached < asked->recorded) step();
    return asked->reached < asked->recorded ? NOT_READY : OK;
}
API cuEventSynchronize(void *event) {
    LOCKED;
    Event *asked = (Event *)event;
    while (asked->reached < asked->recorded) {
        if (!step()) return 999;
    }
    return OK;
}

using Kernel = void (*)(const Row *, u32, const Place *, u32, const Job *, u32, u32);
using Fetch = void (*)(Vector16 *, const Vector16 *, u32);

API cuModuleLoadData(void **module, const void *) { return *module = (void *)1, OK; }
API cuModuleGetFunction(void **function, void *, const char *name) {
    static const std::map<std::string, Kernel> kernels = {
        {"lmkv_gather_1", lmkv_gather_1},   {"lmkv_gather_2", lmkv_gather_2},   {"lmkv_gather_4", lmkv_gather_4},
        {"lmkv_gather_8", lmkv_gather_8},   {"lmkv_gather_16", lmkv_gather_16}, {"lmkv_scatter_1", lmkv_scatter_1},
        {"lmkv_scatter_2", lmkv_scatter_2}, {"lmkv_scatter_4", lmkv_scatter_4}, {"lmkv_scatter_8", lmkv_scatter_8},
        {"lmkv_scatter_16", lmkv_scatter_16},
    };
    if (!strcmp(name, "lmkv_fetch")) return *function = (void *)lmkv_fetch, OK;
    auto found = kernels.find(name);
    if (found == kernels.end()) return 500;
    *function = (void *)found->second;
    return OK;
}
API cuLaunchKernel(void *function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned, void *stream,
                   void **given, void **) {
    LOCKED;
    launches++;
    std::function<void()> thread;
    if (function == (void *)lmkv_fetch) {
        auto to = *(Vector16 **)given[0];
        auto from = *(const Vector16 **)given[1];
        u32 words = *(u32 *)given[2];
        if (!inside(device_memory, (uintptr_t)to, words * 16) || !inside(pinned_memory, (uintptr_t)from, words * 16)) return INVALID;
        thread = [=] { ((Fetch)function)(to, from, words); };
    } else {
        auto rows = *(const Row **)given[0];
        auto places = *(const Place **)given[2];
        auto jobs = *(const Job **)given[4];
        u32 n_rows = *(u32 *)given[1], n_places = *(u32 *)given[3], n_jobs = *(u32 *)given[5], tiles = *(u32 *)given[6];
        thread = [=] { ((Kernel)function)(rows, n_rows, places, n_places, jobs, n_jobs, tiles); };
    }
    push(stream, [=] {
        gridDim = {blocks, 1, 1};
        blockDim = {threads, 1, 1};
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
            for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) thread();
        }
    });
    return OK;
}
