#!/bin/sh
# programs.sh prepare | PROGRAM SEED: six programs bound by processor and memory, over files in memory that `prepare` made.
set -eu
export LC_ALL=C
at=/dev/shm
case $1 in
prepare)
    chase $at/ring make 24
    python3 - <<'PY'
import random
rng = random.Random(11)
words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(3000)]
with open("/dev/shm/text", "w") as out:
    for _ in range(90000):
        out.write(" ".join(rng.choices(words, k=12)) + "\n")
PY
    ;;
chase) chase $at/ring follow 24 "$2" 4000000 ;;
sort) head -n 40000 $at/text | sort -S 64M -k "$(($2 % 5 + 1))" | tail -n 1 ;;
pack) zstd -q -3 -c $at/text | wc -c ;;
digest) sha256sum $at/text ;;
count)
    python3 - "$2" <<'PY'
import sys
seen = {}
for number, line in enumerate(open("/dev/shm/text")):
    if number % 2 == int(sys.argv[1]) % 2:
        for word in line.split():
            seen[word] = seen.get(word, 0) + 1
print(max(seen.items(), key=lambda found: found[1]))
PY
    ;;
primes)
    perl -e 'my ($n, $c) = (300000 + $ARGV[0], 0); my $s = "\1" x ($n + 1);
for my $i (2 .. $n) { next unless vec($s, $i, 8); $c++; for (my $j = $i * $i; $j <= $n; $j += $i) { vec($s, $j, 8) = 0 } }
print "$c\n"' "$2"
    ;;
*)
    echo "there is no program $1" >&2
    exit 2
    ;;
esac
