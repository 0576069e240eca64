/* A GPU: its context, streams, staging rings, pinned memory, and copies that are under way. How they are made is in gpu_submit.c. */
#include "gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef LMKV_FATBIN
#include LMKV_FATBIN
#else
static const unsigned char lmkv_image[1];
static const size_t lmkv_image_bytes = 0;
#endif

const unsigned char *lmkv_gpu_image(size_t *size) {
    *size = lmkv_image_bytes;
    return lmkv_image_bytes ? lmkv_image : NULL;
}

int gpu_failed(gpu_status status, const char *what, char *why, size_t room) {
    if (!status) return 0;
    lmkv_refuse(why, room, "%s: the GPU's driver says: %s (%d)", what, gpu_text(status), status);
    return -1;
}

int lmkv_gpu_count(char *why, size_t room) {
    const gpu_driver *driver = gpu_driver_load(why, room);
    int count = 0;
    if (!driver || gpu_failed(driver->device_count(&count), "counting devices", why, room)) return -1;
    return count;
}

/* The engine may be capturing a graph on another thread: what happens here is not part of it, and must not break it. */
static _Thread_local int capture_mode;

int gpu_enter(lmkv_gpu *gpu, char *why, size_t room) {
    if (gpu_failed(gpu->driver->context_push(gpu->context), "making the context current", why, room)) return -1;
    capture_mode = GPU_CAPTURE_RELAXED;
    gpu->driver->capture_mode(&capture_mode);
    return 0;
}

void gpu_leave(lmkv_gpu *gpu) {
    gpu_context popped;
    gpu->driver->capture_mode(&capture_mode);
    gpu->driver->context_pop(&popped);
}

/* -- opening ----------------------------------------------------------------------------------------------------------- */

static int find_context(lmkv_gpu *gpu, char *why, size_t room) {
    gpu_device current = -1;
    gpu_context context = NULL;
    if (!gpu->driver->context_current(&context) && context && !gpu->driver->context_device(&current) && current == gpu->device) {
        gpu->context = context;
        return 0;
    }
    return gpu_failed(gpu->driver->primary_retain(&gpu->context, gpu->device), "opening the device", why, room);
}

static int load_kernels(lmkv_gpu *gpu, const void *image, char *why, size_t room) {
    static const char *const names[2][WIDTHS] = {
        {"lmkv_scatter_1", "lmkv_scatter_2", "lmkv_scatter_4", "lmkv_scatter_8", "lmkv_scatter_16"},
        {"lmkv_gather_1", "lmkv_gather_2", "lmkv_gather_4", "lmkv_gather_8", "lmkv_gather_16"},
    };
    gpu_module module;
    if (gpu_failed(gpu->driver->module_load(&module, image), "loading the kernels", why, room)) return -1;
    for (int into = 0; into < 2; into++) {
        for (int width = 0; width < WIDTHS; width++) {
            gpu_status status = gpu->driver->module_function(&gpu->kernels[into][width], module, names[into][width]);
            if (gpu_failed(status, names[into][width], why, room)) return -1;
        }
    }
    return gpu_failed(gpu->driver->module_function(&gpu->fetch, module, "lmkv_fetch"), "lmkv_fetch", why, room);
}

static int make_streams(lmkv_gpu *gpu, char *why, size_t room) {
    int least = 0, greatest = 0;
    if (gpu_failed(gpu->driver->priority_range(&least, &greatest), "asking for priorities", why, room)) return -1;
    for (int into = 0; into < 2; into++) {
        staging_ring *ring = &gpu->rings[into];
        /* Somebody waits for a load: its kernels, short and few, go first when multiprocessors come free. Nobody waits for a
         * store: its kernels take what is left. */
        int priority = into ? least : greatest;
        gpu_status status = gpu->driver->stream_create(&ring->wire, GPU_STREAM_NON_BLOCKING, priority);
        if (!status) status = gpu->driver->stream_create(&ring->work, GPU_STREAM_NON_BLOCKING, priority);
        for (int i = 0; !status && i < MOST_ENTRIES; i++) {
            status = gpu->driver->event_create(&ring->moved[i], GPU_EVENT_NO_TIMING);
            if (!status) status = gpu->driver->event_create(&ring->worked[i], GPU_EVENT_NO_TIMING);
        }
        if (gpu_failed(status, "making streams and events", why, room)) return -1;
    }
    return 0;
}

lmkv_gpu *lmkv_gpu_open(int device, const void *image, char *why, size_t room) {
    const gpu_driver *driver = gpu_driver_load(why, room);
    int count = driver ? lmkv_gpu_count(why, room) : -1;
    if (count < 0) return NULL;
    if (device < 0 || device >= count) {
        lmkv_refuse(why, room, "expected a device from 0 to %d; got %d", count - 1, device);
        return NULL;
    }
    lmkv_gpu *gpu = calloc(1, sizeof *gpu);
    if (!gpu) {
        lmkv_refuse(why, room, "expected memory for a GPU's state; there is none");
        return NULL;
    }
    gpu->driver = driver;
    gpu->options = (lmkv_gpu_options){.entry_bytes = 40 << 20, .entries = 2, .thread_blocks = 132, .beside_blocks = 16, .threads = 512, .direct_bytes = 256 << 10};
    pthread_mutex_init(&gpu->lock, NULL);
    if (gpu_failed(driver->device_get(&gpu->device, device), "finding the device", why, room) || find_context(gpu, why, room) ||
        gpu_enter(gpu, why, room)) {
        free(gpu);
        return NULL;
    }
    int failed = load_kernels(gpu, image, why, room) || make_streams(gpu, why, room);
    gpu_leave(gpu);
    if (failed) { /* a device that refuses these is not opened twice: what it gave stays with the context */
        free(gpu);
        return NULL;
    }
    return gpu;
}

int lmkv_gpu_fact(lmkv_gpu *gpu, const char *fact, char *text, size_t room) {
    if (!strcmp(fact, "name")) return gpu->driver->device_name(text, (int)room, gpu->device) ? -1 : 0;
    if (!strcmp(fact, "pci")) return gpu->driver->device_pci(text, (int)room, gpu->device) ? -1 : 0;
    return -1;
}

int lmkv_gpu_architecture(int device, char *text, size_t text_room, char *why, size_t room) {
    const gpu_driver *driver = gpu_driver_load(why, room);
    gpu_device found = 0;
    int major = 0, minor = 0;
    if (!driver || gpu_failed(driver->device_get(&found, device), "finding the device", why, room) ||
        gpu_failed(driver->device_attribute(&major, GPU_ATTRIBUTE_MAJOR, found), "asking for its architecture", why, room) ||
        gpu_failed(driver->device_attribute(&minor, GPU_ATTRIBUTE_MINOR, found), "asking for its architecture", why, room))
        return -1;
    snprintf(text, text_room, "%d%d", major, minor);
    return 0;
}

int lmkv_gpu_tune(lmkv_gpu *gpu, const lmkv_gpu_options *options, char *why, size_t room) {
    if (options->entry_bytes < 4096 || options->entries < 2 || options->entries > MOST_ENTRIES ||
        options->thread_blocks < 1 || options->thread_blocks > 65535 || options->beside_blocks < 1 ||
        options->beside_blocks > 65535 || options->threads < 32 || options->threads > 1024 || options->direct_bytes < 0)
        return (int)lmkv_refuse(why, room,
                                "expected entries of at least 4096 bytes, 2 to %d of them, 1 to 65535 blocks, also beside transfers, of 32 to 1024 "
                                "threads, direct_bytes of at least 0; got %lld, %lld, %lld, %lld, %lld, %lld",
                                MOST_ENTRIES, (long long)options->entry_bytes, (long long)options->entries,
                                (long long)options->thread_blocks, (long long)options->beside_blocks, (long long)options->threads, (long long)options->direct_bytes);
    pthread_mutex_lock(&gpu->lock);
    gpu->options = *options;
    pthread_mutex_unlock(&gpu->lock);
    return 0;
}

int gpu_ring_ready(lmkv_gpu *gpu, int into_payloads, int64_t entry_bytes, char *why, size_t room) {
    staging_ring *ring = &gpu->rings[into_payloads];
    if (entry_bytes < gpu->options.entry_bytes) entry_bytes = gpu->options.entry_bytes;
    entry_bytes = (entry_bytes + 255) / 256 * 256;
    if (ring->base && ring->entries == gpu->options.entries && ring->wanted_bytes == gpu->options.entry_bytes &&
        ring->entry_bytes >= entry_bytes)
        return 0;
    if (ring->base) {
        gpu_status status = gpu->driver->stream_sync(ring->wire);
        if (!status) status = gpu->driver->stream_sync(ring->work);
        if (gpu_failed(status, "waiting for copies", why, room)) return -1;
        if (gpu_failed(gpu->driver->free(ring->base), "freeing staging memory", why, room)) return -1;
        ring->base = 0;
    }
    if (gpu_failed(gpu->driver->alloc(&ring->base, (size_t)(entry_bytes * gpu->options.entries)), "getting staging memory", why, room)) {
        ring->base = 0;
        return -1;
    }
    ring->entry_bytes = entry_bytes;
    ring->wanted_bytes = gpu->options.entry_bytes;
    ring->entries = gpu->options.entries;
    ring->next = 0;
    return 0;
}

/* -- pinned memory ----------------------------------------------------------------------------------------------------- */

int64_t gpu_pinned_range(const lmkv_gpu *gpu, uint64_t address, size_t bytes) {
    size_t low = 0, high = gpu->n_pinned;
    while (low < high) { /* the last range that begins at or before the address */
        size_t middle = (low + high) / 2;
        if (gpu->pinned[middle].address <= address)
            low = middle + 1;
        else
            high = middle;
    }
    if (!low) return -1;
    const pinned_range *range = &gpu->pinned[low - 1];
    return address - range->address + bytes <= range->bytes ? (int64_t)low - 1 : -1;
}

int lmkv_gpu_pinned(lmkv_gpu *gpu, uint64_t address, size_t bytes) {
    pthread_mutex_lock(&gpu->lock);
    int found = gpu_pinned_range(gpu, address, bytes) >= 0;
    pthread_mutex_unlock(&gpu->lock);
    return found;
}

static int note_pinned(lmkv_gpu *gpu, uint64_t address, size_t bytes, char *why, size_t room) {
    if (gpu->n_pinned == gpu->room_pinned) {
        size_t more = gpu->room_pinned ? 2 * gpu->room_pinned : 64;
        pinned_range *grown = realloc(gpu->pinned, more * sizeof *grown);
        if (!grown) return (int)lmkv_refuse(why, room, "expected memory for a list of %zu pinned ranges; there is none", more);
        gpu->pinned = grown;
        gpu->room_pinned = more;
    }
    size_t at = gpu->n_pinned;
    while (at && gpu->pinned[at - 1].address > address) at--;
    memmove(gpu->pinned + at + 1, gpu->pinned + at, (gpu->n_pinned - at) * sizeof *gpu->pinned);
    gpu->pinned[at] = (pinned_range){address, bytes};
    gpu->n_pinned++;
    return 0;
}

int lmkv_gpu_pin(lmkv_gpu *gpu, uint64_t address, size_t bytes, char *why, size_t room) {
    void *start = (void *)(uintptr_t)address;
    gpu_address seen = 0;
    if (gpu_enter(gpu, why, room)) return -1;
    /* not under the lock: this takes 0.1 to 0.3 s a GiB */
    int failed = gpu_failed(gpu->driver->host_register(start, bytes, GPU_REGISTER_PORTABLE | GPU_REGISTER_MAPPED),
                            "pinning host memory", why, room);
    if (!failed) {
        failed = gpu_failed(gpu->driver->host_pointer(&seen, start, 0), "mapping pinned memory", why, room);
        if (!failed && seen != address)
            failed = (int)lmkv_refuse(why, room, "expected pinned memory at one address for host and device; got two");
        if (!failed) {
            pthread_mutex_lock(&gpu->lock);
            failed = note_pinned(gpu, address, bytes, why, room);
            pthread_mutex_unlock(&gpu->lock);
        }
        if (failed) gpu->driver->host_unregister(start);
    }
    gpu_leave(gpu);
    return failed;
}

int lmkv_gpu_unpin(lmkv_gpu *gpu, uint64_t address, char *why, size_t room) {
    pthread_mutex_lock(&gpu->lock);
    size_t at = 0;
    while (at < gpu->n_pinned && gpu->pinned[at].address != address) at++;
    int found = at < gpu->n_pinned;
    if (found) {
        memmove(gpu->pinned + at, gpu->pinned + at + 1, (gpu->n_pinned - at - 1) * sizeof *gpu->pinned);
        gpu->n_pinned--;
    }
    pthread_mutex_unlock(&gpu->lock);
    if (!found) return (int)lmkv_refuse(why, room, "expected the address of a pinned range; got another");
    if (gpu_enter(gpu, why, room)) return -1;
    int failed = gpu_failed(gpu->driver->host_unregister((void *)(uintptr_t)address), "unpinning host memory", why, room);
    gpu_leave(gpu);
    return failed;
}

/* -- copies under way -------------------------------------------------------------------------------------------------- */

static int grow_table(lmkv_gpu_copy *copy, size_t bytes, char *why, size_t room) {
    const gpu_driver *driver = copy->gpu->driver;
    if (copy->table_bytes >= bytes) return 0;
    if (copy->table) driver->free(copy->table);
    if (copy->host_table) driver->host_free(copy->host_table);
    copy->table = 0;
    copy->host_table = NULL;
    copy->table_bytes = 0;
    size_t size = 64 << 10;
    while (size < bytes) size *= 2;
    if (gpu_failed(driver->host_alloc((void **)&copy->host_table, size, 0), "getting memory for a plan", why, room) ||
        gpu_failed(driver->alloc(&copy->table, size), "getting memory for a plan", why, room))
        return -1;
    copy->table_bytes = size;
    return 0;
}

static int grow_groups(lmkv_gpu_copy *copy, int64_t groups, char *why, size_t room) {
    if (copy->room_groups >= groups) return 0;
    gpu_event *events = realloc(copy->group_done, (size_t)groups * sizeof *events);
    if (events) copy->group_done = events;
    int64_t *ends = realloc(copy->ends, (size_t)groups * sizeof *ends);
    if (ends) copy->ends = ends;
    if (!events || !ends) return (int)lmkv_refuse(why, room, "expected memory for %lld groups; there is none", (long long)groups);
    while (copy->room_groups < groups) {
        gpu_status status = copy->gpu->driver->event_create(&copy->group_done[copy->room_groups], GPU_EVENT_NO_TIMING);
        if (gpu_failed(status, "making an event", why, room)) return -1;
        copy->room_groups++;
    }
    return 0;
}

static void put_back(lmkv_gpu_copy *copy) {
    copy->next = copy->gpu->spare;
    copy->gpu->spare = copy;
}

lmkv_gpu_copy *gpu_copy_new(lmkv_gpu *gpu, size_t table_bytes, int64_t groups, char *why, size_t room) {
    lmkv_gpu_copy *copy = gpu->spare;
    if (copy) {
        gpu->spare = copy->next;
    } else {
        copy = calloc(1, sizeof *copy);
        if (!copy) {
            lmkv_refuse(why, room, "expected memory for a copy's state; there is none");
            return NULL;
        }
        copy->gpu = gpu;
        gpu_status status = gpu->driver->event_create(&copy->start, GPU_EVENT_NO_TIMING);
        if (!status) status = gpu->driver->event_create(&copy->finished, GPU_EVENT_NO_TIMING);
        if (gpu_failed(status, "making an event", why, room)) {
            free(copy);
            return NULL;
        }
    }
    copy->is_done = 0;
    if (grow_table(copy, table_bytes, why, room) || grow_groups(copy, groups, why, room)) {
        put_back(copy);
        return NULL;
    }
    copy->groups = groups;
    return copy;
}

int lmkv_gpu_done(lmkv_gpu_copy *copy, char *why, size_t room) {
    if (copy->is_done) return 1;
    if (gpu_enter(copy->gpu, why, room)) return -1;
    gpu_status status = copy->gpu->driver->event_query(copy->finished);
    gpu_leave(copy->gpu);
    if (status == GPU_NOT_READY) return 0;
    if (gpu_failed(status, "copying", why, room)) return -1;
    copy->is_done = 1;
    return 1;
}

int lmkv_gpu_wait(lmkv_gpu_copy *copy, char *why, size_t room) {
    if (copy->is_done) return 0;
    if (gpu_enter(copy->gpu, why, room)) return -1;
    gpu_status status = copy->gpu->driver->event_sync(copy->finished);
    gpu_leave(copy->gpu);
    if (gpu_failed(status, "copying", why, room)) return -1;
    copy->is_done = 1;
    return 0;
}

int lmkv_gpu_order(lmkv_gpu_copy *copy, int64_t row, uint64_t stream, char *why, size_t room) {
    int64_t group = 0;
    while (group < copy->groups - 1 && row >= copy->ends[group]) group++;
    if (row < 0 || row >= copy->ends[copy->groups - 1])
        return (int)lmkv_refuse(why, room, "expected a row from 0 to %lld; got %lld", (long long)copy->ends[copy->groups - 1] - 1,
                                (long long)row);
    if (gpu_enter(copy->gpu, why, room)) return -1;
    gpu_status status = copy->gpu->driver->stream_wait((gpu_stream)(uintptr_t)stream, copy->group_done[group], 0);
    gpu_leave(copy->gpu);
    return gpu_failed(status, "ordering a stream", why, room);
}

void lmkv_gpu_forget(lmkv_gpu_copy *copy) {
    if (!copy) return;
    lmkv_gpu_wait(copy, NULL, 0); /* of a device that failed nothing is under way any more */
    pthread_mutex_lock(&copy->gpu->lock);
    put_back(copy);
    pthread_mutex_unlock(&copy->gpu->lock);
}
