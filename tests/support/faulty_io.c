/* Preloaded into a process, makes file operations below one directory fail on demand, or writes them to a log.
 *
 * FAULTY_IO_DIRECTORY  the directory
 * FAULTY_IO_CONTROL    a file of int32: errno that writes, syncs, reads, allocations and direct opens fail with (0: they don't)
 * FAULTY_IO_LOG        a file that every change is appended to: see struct entry
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITES, SYNCS, READS, ALLOCATIONS, DIRECT_OPENS, COUNT };

struct entry {
    uint32_t kind;  /* 'W' write, 'D' write that is durable when it returns, 'S' sync, 'A' allocate, 'T' truncate */
    uint32_t name;  /* bytes of the file's name, which follow */
    uint64_t offset;
    uint64_t size;  /* bytes of data, which follow the name of 'W' and 'D' */
};

static volatile int32_t *control;
static char directory[PATH_MAX];
static size_t directory_length;
static int log_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static ssize_t (*real_write)(int, const void *, size_t);

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAULTY_IO_DIRECTORY");
    *(void **)&real_write = dlsym(RTLD_NEXT, "write");
    if (path != NULL) {
        snprintf(directory, sizeof directory, "%s/", path);
        directory_length = strlen(directory);
    }
    path = getenv("FAULTY_IO_CONTROL");
    if (path != NULL) {
        int fd = open(path, O_RDWR | O_CLOEXEC);
        void *memory = fd < 0 ? MAP_FAILED : mmap(NULL, COUNT * sizeof *control, PROT_READ, MAP_SHARED, fd, 0);
        if (memory != MAP_FAILED) control = memory;
    }
    path = getenv("FAULTY_IO_LOG");
    if (path != NULL) log_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

/* The name of a file that lies in the directory; NULL for others. */
static const char *name_of(int fd, char *buffer, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, size - 1);
    if (!directory_length || length <= (ssize_t)directory_length) return NULL;
    buffer[length] = 0;
    return strncmp(buffer, directory, directory_length) ? NULL : buffer + directory_length;
}

static int fails(int operation, int fd) {
    char buffer[PATH_MAX];
    if (control == NULL || !control[operation] || name_of(fd, buffer, sizeof buffer) == NULL) return 0;
    errno = control[operation];
    return 1;
}

static void put(const void *data, size_t size) {
    const char *at = data;
    while (size) {
        ssize_t done = real_write(log_fd, at, size);
        if (done <= 0) abort();
        at += done, size -= done;
    }
}

static void note(uint32_t kind, int fd, uint64_t offset, const struct iovec *pieces, int count, uint64_t size) {
    char buffer[PATH_MAX];
    int saved = errno;
    const char *name = log_fd < 0 ? NULL : name_of(fd, buffer, sizeof buffer);
    if (name != NULL && strcmp(name, "lock.mdb")) {
        if (kind == 'W' && fcntl(fd, F_GETFL) & O_DSYNC) kind = 'D';
        struct entry entry = {kind, strlen(name), offset, size};
        pthread_mutex_lock(&lock);
        put(&entry, sizeof entry);
        put(name, entry.name);
        for (int i = 0; i < count && size; i++) {
            size_t part = pieces[i].iov_len < size ? pieces[i].iov_len : size;
            put(pieces[i].iov_base, part);
            size -= part;
        }
        pthread_mutex_unlock(&lock);
    }
    errno = saved;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (real == NULL) *(void **)&real = dlsym(RTLD_NEXT, name)

#define WRITEV(symbol) \
    ssize_t symbol(int fd, const struct iovec *pieces, int count, off_t offset) { \
        REAL(ssize_t, #symbol, int, const struct iovec *, int, off_t); \
        if (fails(WRITES, fd)) return -1; \
        ssize_t done = real(fd, pieces, count, offset); \
        if (done > 0) note('W', fd, offset, pieces, count, done); \
        return done; \
    }
WRITEV(pwritev)
WRITEV(pwritev64)

#define WRITEV2(symbol) \
    ssize_t symbol(int fd, const struct iovec *pieces, int count, off_t offset, int flags) { \
        REAL(ssize_t, #symbol, int, const struct iovec *, int, off_t, int); \
        if (fails(WRITES, fd)) return -1; \
        ssize_t done = real(fd, pieces, count, offset, flags); \
        if (done > 0) note('W', fd, offset, pieces, count, done); \
        return done; \
    }
WRITEV2(pwritev2)
WRITEV2(pwritev64v2)

#define PWRITE(symbol) \
    ssize_t symbol(int fd, const void *data, size_t size, off_t offset) { \
        REAL(ssize_t, #symbol, int, const void *, size_t, off_t); \
        if (fails(WRITES, fd)) return -1; \
        ssize_t done = real(fd, data, size, offset); \
        struct iovec piece = {(void *)data, size}; \
        if (done > 0) note('W', fd, offset, &piece, 1, done); \
        return done; \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t write(int fd, const void *data, size_t size) {
    if (fails(WRITES, fd)) return -1;
    off_t offset = lseek(fd, 0, SEEK_CUR);
    ssize_t done = real_write(fd, data, size);
    struct iovec piece = {(void *)data, size};
    if (done > 0 && offset >= 0) note('W', fd, offset, &piece, 1, done);
    return done;
}

ssize_t writev(int fd, const struct iovec *pieces, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (fails(WRITES, fd)) return -1;
    off_t offset = lseek(fd, 0, SEEK_CUR);
    ssize_t done = real(fd, pieces, count);
    if (done > 0 && offset >= 0) note('W', fd, offset, pieces, count, done);
    return done;
}

#define READV(symbol, parameters, arguments) \
    ssize_t symbol parameters { \
        static ssize_t (*real) parameters; \
        if (real == NULL) *(void **)&real = dlsym(RTLD_NEXT, #symbol); \
        return fails(READS, fd) ? -1 : real arguments; \
    }
READV(preadv, (int fd, const struct iovec *pieces, int count, off_t offset), (fd, pieces, count, offset))
READV(preadv64, (int fd, const struct iovec *pieces, int count, off_t offset), (fd, pieces, count, offset))
READV(preadv2, (int fd, const struct iovec *pieces, int count, off_t offset, int flags), (fd, pieces, count, offset, flags))
READV(preadv64v2, (int fd, const struct iovec *pieces, int count, off_t offset, int flags), (fd, pieces, count, offset, flags))

#define SYNC(symbol) \
    int symbol(int fd) { \
        REAL(int, #symbol, int); \
        if (fails(SYNCS, fd)) return -1; \
        int result = real(fd); \
        if (!result) note('S', fd, 0, NULL, 0, 0); \
        return result; \
    }
SYNC(fsync)
SYNC(fdatasync)

/* size 0 of a sync and an allocation: no data follow */
#define ALLOCATE(symbol) \
    int symbol(int fd, off_t offset, off_t size) { \
        REAL(int, #symbol, int, off_t, off_t); \
        if (fails(ALLOCATIONS, fd)) return errno; \
        int result = real(fd, offset, size); \
        if (!result) note('A', fd, offset, NULL, 0, size); \
        return result; \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

#define TRUNCATE(symbol) \
    int symbol(int fd, off_t size) { \
        REAL(int, #symbol, int, off_t); \
        if (fails(ALLOCATIONS, fd)) return -1; \
        int result = real(fd, size); \
        if (!result) note('T', fd, 0, NULL, 0, size); \
        return result; \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define OPEN(symbol) \
    int symbol(const char *path, int flags, ...) { \
        REAL(int, #symbol, const char *, int, ...); \
        va_list more; \
        va_start(more, flags); \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more); \
        if (control != NULL && control[DIRECT_OPENS] && flags & O_DIRECT && !strncmp(path, directory, directory_length)) { \
            errno = control[DIRECT_OPENS]; \
            return -1; \
        } \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
