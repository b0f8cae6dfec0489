// Preloaded before the C library: at the n-th file operation below a folder the disk is full, or the process is killed or stopped.
// Whatever writes (Python, Arrow, torch's archive writer, safetensors) comes through here; trials.py sets what is to happen.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, FULL, KILL, STOP };

static char prefix[4096];
static int action;
static long at, operations, writes;

void trial_set(const char *folder, int what, long when) {
    strncpy(prefix, folder, sizeof prefix - 1);
    action = what;
    at = when;
    operations = writes = 0;
}
long trial_operations(void) { return operations; }
long trial_writes(void) { return writes; }

static int below(const char *path) { return prefix[0] && path && strncmp(path, prefix, strlen(prefix)) == 0; }

static int below_fd(int fd) {
    char link[64], path[4096];
    if (!prefix[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

// Whether the operation is to fail: one that needs space, on a disk that is full from the n-th such operation on.
static int disturbed(int needs_space) {
    long operation = __atomic_add_fetch(&operations, 1, __ATOMIC_SEQ_CST);
    long write = needs_space ? __atomic_add_fetch(&writes, 1, __ATOMIC_SEQ_CST) : 0;
    if (action == KILL && operation == at) kill(getpid(), SIGKILL), pause();
    if (action == STOP && operation == at) kill(getpid(), SIGSTOP);
    if (action == FULL && needs_space && write >= at) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return below_fd(fd) && disturbed(1) ? -1 : real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    return below_fd(fd) && disturbed(1) ? -1 : real(fd, data, size, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    return below_fd(fd) && disturbed(1) ? -1 : real(fd, data, size, offset);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    return below_fd(fd) && disturbed(1) ? -1 : real(fd, parts, count);
}
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    REAL(ssize_t, "sendfile", int, int, off_t *, size_t);
    return below_fd(to) && disturbed(1) ? -1 : real(to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off_t *offset, size_t size) {
    REAL(ssize_t, "sendfile64", int, int, off_t *, size_t);
    return below_fd(to) && disturbed(1) ? -1 : real(to, from, offset, size);
}
ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *target, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    return below_fd(to) && disturbed(1) ? -1 : real(from, start, to, target, size, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return below(path) && disturbed(1) ? -1 : real(path, mode);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return below(to) && disturbed(0) ? -1 : real(from, to);
}
int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    return below(path) && disturbed(0) ? -1 : real(path);
}
int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    return below(path) && disturbed(0) ? -1 : real(path);
}
int fsync(int fd) {
    REAL(int, "fsync", int);
    return below_fd(fd) && disturbed(0) ? -1 : real(fd);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        mode_t mode = 0; \
        if (flags & O_CREAT) { \
            va_list arguments; \
            va_start(arguments, flags); \
            mode = va_arg(arguments, mode_t); \
            va_end(arguments); \
        } \
        REAL(int, #name, const char *, int, ...); \
        return (flags & O_CREAT) && below(path) && access(path, F_OK) && disturbed(1) ? -1 : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
