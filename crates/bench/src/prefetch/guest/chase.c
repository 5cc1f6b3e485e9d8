// chase FILE make MIB | FILE follow MIB START STEPS: a ring of pointers through a file, in random order, one in each
// line of the cache; each step depends on the one before.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { WORDS = 8 };

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    uint64_t bytes = strtoull(argv[3], 0, 10) << 20, lines = bytes / (WORDS * 8), random = 88172645463325252ULL;
    int make = !strcmp(argv[2], "make");
    int file = open(argv[1], make ? O_RDWR | O_CREAT : O_RDONLY, 0644);
    if (file < 0 || (make && ftruncate(file, bytes))) return 1;
    uint64_t *ring = mmap(0, bytes, make ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, file, 0);
    if (ring == MAP_FAILED) return 1;
    if (make) {
        // Sattolo's shuffle: one ring through all lines. The other words make every page different.
        uint64_t *order = malloc(lines * 8);
        for (uint64_t i = 0; i < lines; i++) order[i] = i;
        for (uint64_t i = lines - 1; i > 0; i--) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            uint64_t j = random % i, kept = order[i];
            order[i] = order[j], order[j] = kept;
        }
        for (uint64_t i = 0; i < lines; i++) {
            ring[i * WORDS] = order[i];
            for (int word = 1; word < WORDS; word++) ring[i * WORDS + word] = order[(i + word * 4099) % lines];
        }
        return 0;
    }
    if (argc < 6) return 2;
    uint64_t at = strtoull(argv[4], 0, 10) % lines, sum = 0;
    for (uint64_t steps = strtoull(argv[5], 0, 10); steps; steps--) {
        at = ring[at * WORDS];
        sum += at;
    }
    printf("%llu\n", (unsigned long long)sum);
    return 0;
}
