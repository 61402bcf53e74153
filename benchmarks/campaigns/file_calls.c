/* Loaded before the C library by power_loss.py: records what this process does to the files of one folder, and lets
   one of these calls fail.

   A record is a line for each call, "NAME INODE OFFSET LENGTH", with LENGTH bytes behind it: what was written, or the
   path. What the C library does by itself (fwrite) is not seen: power_loss.py compares its record with the disk. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char folder[PATH_MAX];
static int record = -1;  /* a descriptor */
static long calls, nth;  /* how many there were; the one that fails, 0 for none */
static int error, for_good;  /* what it fails with, a signal if below 0; whether all later ones fail too */

/* From now on. */
void watch_folder(const char *path, int descriptor, long fail_nth, int fail_error, int fail_for_good) {
    snprintf(folder, sizeof folder, "%s/", path);
    record = descriptor;
    nth = fail_nth;
    error = fail_error;
    for_good = fail_for_good;
}

static void note(const char *name, ino_t inode, off_t offset, const void *bytes, size_t length) {
    char line[100];
    int size = snprintf(line, sizeof line, "%s %lu %ld %zu\n", name, (unsigned long)inode, (long)offset, length);
    struct iovec parts[] = {{line, size}, {(void *)bytes, length}};
    if (REAL(writev)(record, parts, 2) != size + (ssize_t)length) _exit(99);
}

static int fails(void) {
    calls++;
    if (!nth || calls < nth || (calls > nth && !for_good)) return 0;
    note("fail", 0, 0, "", 0);
    if (error < 0) return raise(-error), 0;
    errno = error;
    return 1;
}

/* Whether a path lies in the folder; makes it absolute. */
static int inside(const char *path, char *whole) {
    if (record < 0) return 0;
    char here[PATH_MAX] = "";
    if (*path != '/' && !getcwd(here, sizeof here)) return 0;
    if (snprintf(whole, PATH_MAX, "%s%s%s", here, *path == '/' ? "" : "/", path) >= PATH_MAX) return 0;
    size_t length = strlen(folder) - 1;
    return !strncmp(whole, folder, length) && (!whole[length] || whole[length] == '/');
}

/* The inode behind a descriptor of a file or folder there, or 0. */
static ino_t watched(int descriptor) {
    char link[40], path[PATH_MAX], whole[PATH_MAX];
    struct stat facts;
    if (record < 0 || descriptor == record) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 1 || *path != '/') return 0;
    path[length] = 0;
    return inside(path, whole) && !fstat(descriptor, &facts) ? facts.st_ino : 0;
}

static int opened(const char *path, int flags, mode_t mode) {
    char whole[PATH_MAX];
    struct stat facts;
    if (!inside(path, whole)) return REAL(open64)(path, flags, mode);
    int there = !stat(whole, &facts), writes = (flags & O_ACCMODE) != O_RDONLY;
    if ((writes || (there && S_ISDIR(facts.st_mode))) && fails()) return -1;
    int descriptor = REAL(open64)(path, flags, mode);
    if (descriptor >= 0 && !fstat(descriptor, &facts)) {
        if (!there) note("create", facts.st_ino, 0, whole, strlen(whole));
        else if (flags & O_TRUNC) note("truncate", facts.st_ino, 0, "", 0);
    }
    return descriptor;
}

#define OPEN(name)                                              \
    int name(const char *path, int flags, ...) {                \
        va_list more;                                           \
        va_start(more, flags);                                  \
        mode_t mode = flags & O_CREAT ? va_arg(more, int) : 0;  \
        va_end(more);                                           \
        return opened(path, flags, mode);                       \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int descriptor, const void *bytes, size_t length) {
    ino_t inode = watched(descriptor);
    if (inode && fails()) return -1;
    ssize_t written = REAL(write)(descriptor, bytes, length);
    if (inode && written > 0) note("write", inode, lseek(descriptor, 0, SEEK_CUR) - written, bytes, written);
    return written;
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t length, off64_t offset) {
    ino_t inode = watched(descriptor);
    if (inode && fails()) return -1;
    ssize_t written = REAL(pwrite64)(descriptor, bytes, length, offset);
    if (inode && written > 0) note("write", inode, offset, bytes, written);
    return written;
}

#define ON_DESCRIPTOR(name, noted)                                  \
    int name(int descriptor) {                                      \
        ino_t inode = watched(descriptor);                          \
        if (inode && fails()) return -1;                            \
        int failed = REAL(name)(descriptor);                        \
        if (inode && !failed) note(noted, inode, 0, "", 0);         \
        return failed;                                              \
    }
ON_DESCRIPTOR(fsync, "fsync")
ON_DESCRIPTOR(fdatasync, "fsync")

int ftruncate64(int descriptor, off64_t length) {
    ino_t inode = watched(descriptor);
    if (inode && fails()) return -1;
    int failed = REAL(ftruncate64)(descriptor, length);
    if (inode && !failed) note("truncate", inode, length, "", 0);
    return failed;
}

/* Of one path, or of an old and a new one, which are recorded with a zero byte between them. */
static int named(const char *name, const char *old, const char *new, int (*call)(const char *, const char *)) {
    char from[PATH_MAX], to[PATH_MAX] = "", both[2 * PATH_MAX];
    struct stat facts;
    if (!inside(old, from) || (new && !inside(new, to))) return call(old, new);
    if (fails()) return -1;
    int there = !lstat(from, &facts), failed = call(old, new);
    if (failed || (!there && lstat(from, &facts))) return failed;
    note(name, facts.st_ino, 0, both, snprintf(both, sizeof both, new ? "%s%c%s" : "%s", from, 0, to));
    return 0;
}

static mode_t new_mode;
static int call_unlink(const char *old, const char *new) { return (void)new, REAL(unlink)(old); }
static int call_mkdir(const char *old, const char *new) { return (void)new, REAL(mkdir)(old, new_mode); }
static int call_rename(const char *old, const char *new) { return REAL(rename)(old, new); }
static int call_link(const char *old, const char *new) { return REAL(link)(old, new); }

int unlink(const char *path) { return named("unlink", path, NULL, call_unlink); }
int mkdir(const char *path, mode_t mode) { return new_mode = mode, named("mkdir", path, NULL, call_mkdir); }
int rename(const char *old, const char *new) { return named("rename", old, new, call_rename); }
int link(const char *old, const char *new) { return named("link", old, new, call_link); }
