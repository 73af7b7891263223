"""A process that says whether two answers are the same mathematics, by `math_verify`: run by `pool.py`, not imported.

    python worker.py SECONDS BYTES

It writes "ready" once it can begin, or what keeps it from that. For a line with two answers, the gold one first, as a
JSON list, it writes "1" or "0". Computing on one line for SECONDS of processor time ends the process, whatever it is
in; memory beyond BYTES of addresses is not given. It imports nothing of this package.
"""

import functools
import json
import os
import re
import resource
import signal
import sys

seconds, memory = float(sys.argv[1]), int(sys.argv[2])
replies = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what a library prints is no reply
try:
    import math_verify
    import sympy
except BaseException as error:
    replies.write(f"{type(error).__name__}: {error}".replace("\n", " ") + "\n")
    raise


@functools.lru_cache(64)  # the samples of a problem have one gold answer
def parse(answer: str) -> list:
    if re.fullmatch("-?[0-9]{1,100}", answer):  # what its parser makes of it too, in a hundredth of the time
        return [sympy.Integer(answer), answer]
    return math_verify.parse(rf"\boxed{{{answer}}}", parsing_timeout=None)


def same(gold: str, answer: str) -> bool:
    try:
        return math_verify.verify(parse(gold), parse(answer), timeout_seconds=None)
    except (Exception, MemoryError):  # of parsers and of algebra, on what may be no mathematics at all
        return False


same("1", "2")  # what is loaded at first use is loaded now
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
replies.write("ready\n")
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends a process, in the middle of a long product too
    verdict = same(*json.loads(line))
    signal.setitimer(signal.ITIMER_PROF, 0)
    replies.write(f"{verdict:d}\n")
