/* Finding the driver's library and its calls, once a process. */
#include "driver.h"

#include "plan.h"

#if defined(_WIN32)
const gpu_driver *gpu_driver_load(char *why, size_t room) {
    lmkv_refuse(why, room, "expected a GPU driver; on this platform none is looked for");
    return NULL;
}
const char *gpu_text(gpu_status status) {
    (void)status;
    return "no driver";
}
#else
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static gpu_driver driver;
static int loaded;
static char problem[200];

static void load(void) {
    void *library = dlopen(GPU_LIBRARY, RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
        snprintf(problem, sizeof problem, "expected a GPU driver; %s can't be loaded", GPU_LIBRARY);
        return;
    }
#define X(field, symbol, parameters)                                                                              \
    *(void **)&driver.field = dlsym(library, symbol);                                                             \
    if (!driver.field) {                                                                                          \
        snprintf(problem, sizeof problem, "expected %s in %s; update the driver", symbol, GPU_LIBRARY);           \
        return;                                                                                                   \
    }
    GPU_CALLS(X)
#undef X
    gpu_status status = driver.init(0);
    if (status) {
        snprintf(problem, sizeof problem, "expected a usable GPU driver; it says: %s (%d)", gpu_text(status), status);
        return;
    }
    loaded = 1;
}

const gpu_driver *gpu_driver_load(char *why, size_t room) {
    pthread_once(&once, load);
    if (loaded) return &driver;
    lmkv_refuse(why, room, "%s", problem);
    return NULL;
}

const char *gpu_text(gpu_status status) {
    const char *text = NULL;
    if (!driver.error_text || driver.error_text(status, &text) || !text) return "unknown error";
    return text;
}
#endif
