#!/bin/sh
# Prints the path of the Python that `make setup` takes, or nothing where there is none: of those on PATH that are
# supported and can make environments, the newest, and the first of that version, unless another is clearly faster.
# Some are built without the compiler's optimizations, as version managers build them unless told otherwise: Python
# itself takes half as long again with them, and the tests a fifth.
set -f
IFS=:
for folder in $PATH; do
    for name in python3.13 python3.12 python3.11 python3; do
        [ -x "$folder/$name" ] && "$folder/$name" -I - 2>/dev/null <<'PYTHON'
import ensurepip, sys, time, venv

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(1)


class Number:
    def __init__(self, value):
        self.value = value

    def below(self):
        return 1 if self.value < 2 else Number(self.value - 1).below() + Number(self.value - 2).below()


def seconds():
    begun = time.perf_counter()
    Number(21).below()
    return time.perf_counter() - begun


print(sys.version_info[1], min(seconds() for _ in range(5)), sys.executable, sep="\t")
PYTHON
    done
done | sort -s -k 1,1nr | awk -F '\t' '
    { time[NR] = $2; path[NR] = $3; if (NR == 1 || $2 < fastest) fastest = $2 }
    END { for (i = 1; i <= NR; i++) if (fastest > 0.85 * time[i]) { print path[i]; exit } }'
