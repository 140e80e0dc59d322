"""Signals at any moment of a run: exit code 75, 0 or 130, one line, and a folder that goes on.

Starts a small run over and over, sends it a signal after so many seconds, and looks at how it
ended. What cannot be caught is the time before Python runs the first line of ours, long on a busy
machine: seconds count from there.

    python soak/signals.py OUT                   # 20 moments from 0 to 6 s, every signal
    python soak/signals.py OUT --moments 5 --until 3
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

CODES = {
    signal.SIGINT: (0, 130),
    signal.SIGTERM: (0,),
    signal.SIGHUP: (0,),
    signal.SIGUSR1: (75,),
    signal.SIGUSR2: (75,),
}
RUN = (
    "--env probe/identity --policy ippo --network.d-model 8 --ppo.num-envs 4 "
    "--ppo.rollout-length 16 --ppo.num-epochs 1 --ppo.num-minibatches 1 "
    "--total-timesteps 100000000 --eval.num-evaluations 4 "
    "--eval.num-episodes 4 --eval.num-absolute-episodes 4"
)


def interrupted(out: Path, number: int, seconds: float) -> tuple[int, str]:
    """Starts a run, sends it a signal, and returns its exit code and all it printed."""
    command = [sys.executable, "-m", "mam", "train", "--out", str(out), *RUN.split()]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ) as process:
        while process.poll() is None and not listens(process.pid):
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(number)
        try:
            printed, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            return 999, process.communicate()[0]
    return process.returncode, printed


def listens(pid: int) -> bool:
    """Whether a process catches all of the signals, by what Linux says of it."""
    caught = int(Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0], 16)
    return all(caught >> (number - 1) & 1 for number in CODES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--since", type=float, default=0.0)
    parser.add_argument("--until", type=float, default=6.0)
    args = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it, and so do theirs
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as what nohup starts
    counts, failures = Counter(), 0
    for index in range(args.moments):
        seconds = args.since + (args.until - args.since) * index / max(args.moments - 1, 1)
        for number, codes in CODES.items():
            out = args.out / f"{number.name}-{index}"
            code, printed = interrupted(out, number, seconds)
            counts[number.name, code] += 1
            if code not in codes or "Traceback" in printed or "Exception" in printed:
                failures += 1
                print(f"{number.name} after {seconds:.2f} s: exit code {code}\n{printed}")
    for (name, code), count in sorted(counts.items()):
        print(f"{name}: {count} × exit code {code}")
    print(f"{failures} of {sum(counts.values())} ended otherwise than they should")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
