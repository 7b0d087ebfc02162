// Where weights lie in a machine's memory: held against being swapped out, and spread over its nodes.
#include "native.h"

#include <cerrno>
#include <cstdio>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Holds the pages of a region in memory.  Returns 0, or the system's errno: ENOMEM or EPERM where a limit is in the way.
EXPORT int64_t pyrosome_lock(void* begin, int64_t size) {
#if defined(__unix__) || defined(__APPLE__)
    if (size <= 0) return 0;
    return mlock(begin, static_cast<size_t>(size)) == 0 ? 0 : errno;
#else
    (void)begin, (void)size;
    return ENOSYS;
#endif
}

// Has the pages of a region come from nodes 0 .. nodes - 1 in turn, when they are first written: then every node's memory
// gives its share of what is streamed, whichever core asks.  Only pages that are the region's alone: the first and the
// last may be shared with what is beside it.  Returns 0, or the system's errno; ENOSYS where there is no such call.
EXPORT int64_t pyrosome_interleave(void* begin, int64_t size, int64_t nodes) {
#if defined(__linux__) && defined(SYS_mbind)
    constexpr int INTERLEAVE = 3;         // MPOL_INTERLEAVE; its header comes with libnuma, which is not needed else
    constexpr int64_t MOST = 1024, WORD = 8 * sizeof(unsigned long);
    if (nodes < 1 || nodes > MOST) return EINVAL;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(size)) / page * page;
    if (last <= first) return 0;
    unsigned long mask[MOST / WORD] = {};
    for (int64_t node = 0; node < nodes; ++node) mask[node / WORD] |= 1ul << node % WORD;
    const unsigned long bits = MOST + 1;  // the system takes one less than it is told
    return syscall(SYS_mbind, first, last - first, INTERLEAVE, mask, bits, 0) == 0 ? 0 : errno;
#else
    (void)begin, (void)size, (void)nodes;
    return ENOSYS;
#endif
}

// One more than the highest node that has memory; 1 where that cannot be told.
EXPORT int64_t pyrosome_numa_nodes() {
    long highest = 0;
#if defined(__linux__)
    if (FILE* file = std::fopen("/sys/devices/system/node/has_memory", "r")) {
        long number;
        while (std::fscanf(file, "%ld", &number) == 1) {  // such as 0-1,4: the last number is the highest
            highest = std::max(highest, number);
            if (std::fgetc(file) == EOF) break;
        }
        std::fclose(file);
    }
#endif
    return highest + 1;
}
