/* The driver API as it is needed, found with dlopen: no toolkit headers, no runtime. With LMKV_HIP the same calls go to AMD's
 * library under its names; that has never been run. */
#ifndef LMKV_DRIVER_H
#define LMKV_DRIVER_H

#include <stddef.h>
#include <stdint.h>

typedef int gpu_status; /* 0 = success */
typedef int gpu_device;
typedef uint64_t gpu_address;
typedef void *gpu_context, *gpu_stream, *gpu_event, *gpu_module, *gpu_function;

enum { GPU_NOT_READY = 600, GPU_STREAM_NON_BLOCKING = 1, GPU_EVENT_NO_TIMING = 2 };
enum { GPU_REGISTER_PORTABLE = 1, GPU_REGISTER_MAPPED = 2, GPU_HOST = 1, GPU_DEVICE = 2 };
enum { GPU_CAPTURE_RELAXED = 2 };
enum { GPU_ATTRIBUTE_MAJOR = 75, GPU_ATTRIBUTE_MINOR = 76 };

/* CUDA_MEMCPY2D of the driver API. */
typedef struct {
    size_t src_x, src_y;
    int src_type;
    const void *src_host;
    gpu_address src_device;
    void *src_array;
    size_t src_pitch;
    size_t dst_x, dst_y;
    int dst_type;
    void *dst_host;
    gpu_address dst_device;
    void *dst_array;
    size_t dst_pitch;
    size_t width, height;
} gpu_copy_2d;

#ifdef LMKV_HIP
#define GPU_LIBRARY "libamdhip64.so"
#define GPU_NAME(cuda, hip) hip
#else
#define GPU_LIBRARY "libcuda.so.1"
#define GPU_NAME(cuda, hip) cuda
#endif

/* X(field, symbol, parameters) */
#define GPU_CALLS(X)                                                                                                              \
    X(init, GPU_NAME("cuInit", "hipInit"), (unsigned))                                                                            \
    X(device_count, GPU_NAME("cuDeviceGetCount", "hipGetDeviceCount"), (int *))                                                   \
    X(device_get, GPU_NAME("cuDeviceGet", "hipDeviceGet"), (gpu_device *, int))                                                   \
    X(device_name, GPU_NAME("cuDeviceGetName", "hipDeviceGetName"), (char *, int, gpu_device))                                    \
    X(device_attribute, GPU_NAME("cuDeviceGetAttribute", "hipDeviceGetAttribute"), (int *, int, gpu_device))                      \
    X(device_pci, GPU_NAME("cuDeviceGetPCIBusId", "hipDeviceGetPCIBusId"), (char *, int, gpu_device))                             \
    X(error_text, GPU_NAME("cuGetErrorString", "hipDrvGetErrorString"), (gpu_status, const char **))                              \
    X(primary_retain, GPU_NAME("cuDevicePrimaryCtxRetain", "hipDevicePrimaryCtxRetain"), (gpu_context *, gpu_device))             \
    X(context_current, GPU_NAME("cuCtxGetCurrent", "hipCtxGetCurrent"), (gpu_context *))                                          \
    X(context_device, GPU_NAME("cuCtxGetDevice", "hipCtxGetDevice"), (gpu_device *))                                              \
    X(context_push, GPU_NAME("cuCtxPushCurrent_v2", "hipCtxPushCurrent"), (gpu_context))                                          \
    X(context_pop, GPU_NAME("cuCtxPopCurrent_v2", "hipCtxPopCurrent"), (gpu_context *))                                           \
    X(capture_mode, GPU_NAME("cuThreadExchangeStreamCaptureMode", "hipThreadExchangeStreamCaptureMode"), (int *))                 \
    X(priority_range, GPU_NAME("cuCtxGetStreamPriorityRange", "hipDeviceGetStreamPriorityRange"), (int *, int *))                 \
    X(alloc, GPU_NAME("cuMemAlloc_v2", "hipMalloc"), (gpu_address *, size_t))                                                     \
    X(free, GPU_NAME("cuMemFree_v2", "hipFree"), (gpu_address))                                                                   \
    X(host_alloc, GPU_NAME("cuMemHostAlloc", "hipHostMalloc"), (void **, size_t, unsigned))                                       \
    X(host_free, GPU_NAME("cuMemFreeHost", "hipHostFree"), (void *))                                                              \
    X(host_register, GPU_NAME("cuMemHostRegister_v2", "hipHostRegister"), (void *, size_t, unsigned))                             \
    X(host_unregister, GPU_NAME("cuMemHostUnregister", "hipHostUnregister"), (void *))                                            \
    X(host_pointer, GPU_NAME("cuMemHostGetDevicePointer_v2", "hipHostGetDevicePointer"), (gpu_address *, void *, unsigned))       \
    X(to_device, GPU_NAME("cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync"), (gpu_address, const void *, size_t, gpu_stream))         \
    X(to_host, GPU_NAME("cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync"), (void *, gpu_address, size_t, gpu_stream))                 \
    X(copy_2d, GPU_NAME("cuMemcpy2DAsync_v2", "hipMemcpyParam2DAsync"), (const gpu_copy_2d *, gpu_stream))                        \
    X(stream_create, GPU_NAME("cuStreamCreateWithPriority", "hipStreamCreateWithPriority"), (gpu_stream *, unsigned, int))        \
    X(stream_wait, GPU_NAME("cuStreamWaitEvent", "hipStreamWaitEvent"), (gpu_stream, gpu_event, unsigned))                        \
    X(stream_sync, GPU_NAME("cuStreamSynchronize", "hipStreamSynchronize"), (gpu_stream))                                         \
    X(event_create, GPU_NAME("cuEventCreate", "hipEventCreateWithFlags"), (gpu_event *, unsigned))                                \
    X(event_record, GPU_NAME("cuEventRecord", "hipEventRecord"), (gpu_event, gpu_stream))                                         \
    X(event_query, GPU_NAME("cuEventQuery", "hipEventQuery"), (gpu_event))                                                        \
    X(event_sync, GPU_NAME("cuEventSynchronize", "hipEventSynchronize"), (gpu_event))                                             \
    X(module_load, GPU_NAME("cuModuleLoadData", "hipModuleLoadData"), (gpu_module *, const void *))                               \
    X(module_function, GPU_NAME("cuModuleGetFunction", "hipModuleGetFunction"), (gpu_function *, gpu_module, const char *))       \
    X(launch, GPU_NAME("cuLaunchKernel", "hipModuleLaunchKernel"),                                                                \
      (gpu_function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, gpu_stream, void **, void **))

typedef struct {
#define X(field, symbol, parameters) gpu_status(*field) parameters;
    GPU_CALLS(X)
#undef X
} gpu_driver;

/* The loaded driver, initialised; null if there is none: `why` says so. */
const gpu_driver *gpu_driver_load(char *why, size_t room);

/* What a status means. */
const char *gpu_text(gpu_status status);

#endif
