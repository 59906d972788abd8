/* Lets one call of the system fail: the nth of its kind on a file under a folder. Preloaded; armed by fail_call.
 * Without a call to fail, it counts those of every kind. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *const kinds[] = {
    "open", "read", "write", "fsync", "ftruncate", "flock", "stat", "lstat", "rename", "mkdir", "rmdir",
    "unlink", "opendir", "mmap", "fallocate",
};
enum { KINDS = sizeof kinds / sizeof *kinds };
static char folder[PATH_MAX];
static int number, nth, wanted = -1, armed;
static atomic_int made[KINDS];

static int kind_of(const char *call)
{
    for (int kind = 0; kind < KINDS; kind++)
        if (!strcmp(kinds[kind], call))
            return kind;
    return -1;
}

/* An empty call fails none. */
void fail_call(const char *call, int error, int which, const char *under)
{
    snprintf(folder, sizeof folder, "%s", under);
    wanted = kind_of(call);
    number = error;
    nth = which;
    armed = 1;
}

int calls_made(const char *call) { return atomic_load(&made[kind_of(call)]); }

static int is_under(const char *path)
{
    return path != NULL && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_counted(const char *call)
{
    return armed && (wanted < 0 || !strcmp(call, kinds[wanted]));
}

static int counts(const char *call)
{
    int kind = kind_of(call);
    if (atomic_fetch_add(&made[kind], 1) + 1 != nth || kind != wanted)
        return 0;
    errno = number;
    return 1;
}

static int fails_at(const char *call, const char *path)
{
    char whole[PATH_MAX];
    if (!is_counted(call))
        return 0;
    if (path != NULL && path[0] != '/' && realpath(path, whole) != NULL)
        path = whole;
    return is_under(path) && counts(call);
}

static int fails_on(const char *call, int descriptor)
{
    char link[64], path[PATH_MAX];
    if (!is_counted(call))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return is_under(path) && counts(call);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { \
        va_list list; \
        va_start(list, flags); \
        mode = va_arg(list, mode_t); \
        va_end(list); \
    }
#define BY_PATH(type, name, failed, parameters, path, ...) \
    type name parameters { return fails_at(#name, path) ? failed : REAL(name)(__VA_ARGS__); }
#define BY_DESCRIPTOR(type, name, call, parameters, descriptor, ...) \
    type name parameters { return fails_on(call, descriptor) ? (type)-1 : REAL(name)(__VA_ARGS__); }

int open(const char *path, int flags, ...) { MODE(flags) return fails_at("open", path) ? -1 : REAL(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return fails_at("open", path) ? -1 : REAL(open64)(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return fails_at("open", path) ? -1 : REAL(openat)(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return fails_at("open", path) ? -1 : REAL(openat64)(at, path, flags, mode); }
BY_DESCRIPTOR(ssize_t, read, "read", (int fd, void *data, size_t n), fd, fd, data, n)
BY_DESCRIPTOR(ssize_t, pread, "read", (int fd, void *data, size_t n, off_t at), fd, fd, data, n, at)
BY_DESCRIPTOR(ssize_t, pread64, "read", (int fd, void *data, size_t n, off64_t at), fd, fd, data, n, at)
BY_DESCRIPTOR(ssize_t, preadv, "read", (int fd, const struct iovec *v, int n, off_t at), fd, fd, v, n, at)
BY_DESCRIPTOR(ssize_t, preadv64, "read", (int fd, const struct iovec *v, int n, off64_t at), fd, fd, v, n, at)
BY_DESCRIPTOR(ssize_t, preadv2, "read", (int fd, const struct iovec *v, int n, off_t at, int f), fd, fd, v, n, at, f)
BY_DESCRIPTOR(ssize_t, preadv64v2, "read", (int fd, const struct iovec *v, int n, off64_t at, int f), fd, fd, v, n, at, f)
BY_DESCRIPTOR(ssize_t, write, "write", (int fd, const void *data, size_t n), fd, fd, data, n)
BY_DESCRIPTOR(ssize_t, pwrite, "write", (int fd, const void *data, size_t n, off_t at), fd, fd, data, n, at)
BY_DESCRIPTOR(ssize_t, pwrite64, "write", (int fd, const void *data, size_t n, off64_t at), fd, fd, data, n, at)
BY_DESCRIPTOR(ssize_t, writev, "write", (int fd, const struct iovec *v, int n), fd, fd, v, n)
BY_DESCRIPTOR(int, fsync, "fsync", (int fd), fd, fd)
BY_DESCRIPTOR(int, ftruncate, "ftruncate", (int fd, off_t n), fd, fd, n)
BY_DESCRIPTOR(int, ftruncate64, "ftruncate", (int fd, off64_t n), fd, fd, n)
BY_DESCRIPTOR(int, flock, "flock", (int fd, int how), fd, fd, how)
BY_DESCRIPTOR(int, fstat, "stat", (int fd, struct stat *s), fd, fd, s)
BY_DESCRIPTOR(int, fstat64, "stat", (int fd, struct stat64 *s), fd, fd, s)
BY_PATH(int, stat, -1, (const char *path, struct stat *s), path, path, s)
BY_PATH(int, lstat, -1, (const char *path, struct stat *s), path, path, s)
BY_PATH(int, rename, -1, (const char *path, const char *to), path, path, to)
BY_PATH(int, mkdir, -1, (const char *path, mode_t mode), path, path, mode)
BY_PATH(int, rmdir, -1, (const char *path), path, path)
BY_PATH(int, unlink, -1, (const char *path), path, path)
BY_PATH(DIR *, opendir, NULL, (const char *path), path, path)
int stat64(const char *path, struct stat64 *s) { return fails_at("stat", path) ? -1 : REAL(stat64)(path, s); }
int lstat64(const char *path, struct stat64 *s) { return fails_at("lstat", path) ? -1 : REAL(lstat64)(path, s); }
int fstatat(int at, const char *path, struct stat *s, int f) { return fails_at("stat", path) ? -1 : REAL(fstatat)(at, path, s, f); }
int fstatat64(int at, const char *path, struct stat64 *s, int f) { return fails_at("stat", path) ? -1 : REAL(fstatat64)(at, path, s, f); }
int posix_fallocate(int fd, off_t a, off_t n) { return fails_on("fallocate", fd) ? number : REAL(posix_fallocate)(fd, a, n); }
int posix_fallocate64(int fd, off64_t a, off64_t n) { return fails_on("fallocate", fd) ? number : REAL(posix_fallocate64)(fd, a, n); }
void *mmap(void *a, size_t n, int p, int f, int fd, off_t at)
{
    return fd >= 0 && fails_on("mmap", fd) ? MAP_FAILED : REAL(mmap)(a, n, p, f, fd, at);
}
void *mmap64(void *a, size_t n, int p, int f, int fd, off64_t at)
{
    return fd >= 0 && fails_on("mmap", fd) ? MAP_FAILED : REAL(mmap64)(a, n, p, f, fd, at);
}
