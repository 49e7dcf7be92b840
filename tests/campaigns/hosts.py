"""Two hosts, all strategies and ways to interrupt them: ``python -m tests.campaigns.hosts [--strategies ddp hybrid]``.

Needs Linux and root. Each cell trains the run of ``tests/test_hosts.py`` on two hosts through torchrun, whole or with both
hosts switched off in the middle, and prints the largest difference of any step's loss from that of one process. hybrid: two
processes a host, which hold one copy of the model together. Names: with the hosts' names in /etc/hosts and nothing else set.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from gpt2lab.recipe import load_config
from gpt2lab.train import train
from tests.hosts import two_hosts, why_no_hosts
from tests.test_hosts import LONG, STEPS, finish, largest_difference, start, wait_for_step
from tests.test_train import Witness, flags, rows, sentences

STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (1, {"system.strategy": "ddp"}),
    "fsdp": (1, {"system.strategy": "fsdp"}),
    "hybrid": (2, {"system.strategy": "fsdp", "system.shard_size": 2}),
}
"""Processes on each host, and settings."""


def one_process(folder: Path) -> list[dict[str, Any]]:
    """The rows of the run that all are compared with."""
    (folder / "text.txt").write_text(sentences())
    values = LONG | {"data.source": str(folder / "text.txt"), "out": str(folder / "alone")}
    return rows(train(load_config([], flags(values)), Witness().console))


def cell(folder: Path, strategy: str, *, cut: bool, names: bool) -> list[dict[str, Any]]:
    """The rows of a run on two hosts."""
    processes, settings = STRATEGIES[strategy]
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        (folder / name / "text.txt").write_text(sentences())
    if cut:
        with two_hosts(folder) as hosts:
            started = start(hosts, settings, processes)
            wait_for_step(folder, started, STEPS // 2)
    with two_hosts(folder, names=names) as hosts:
        finish(start(hosts, settings, processes, **{"GLOO_SOCKET_IFNAME": ""} if names else {}))
    assert not (folder / "two" / "run").exists()
    return rows(folder / "one" / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    strategies = parser.parse_args().strategies
    if reason := why_no_hosts():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = one_process(folder)
        for number, (strategy, cut, names) in enumerate(
            (strategy, cut, names)
            for strategy in strategies
            for cut, names in ((False, False), (True, False), (False, True))
        ):
            ours = cell(folder / str(number), strategy, cut=cut, names=names)
            how = "both hosts switched off in the middle" if cut else "by names alone" if names else "whole"
            off = {key: largest_difference(ours, expected, key) for key in ("loss", "grad_norm")}
            shown = ", ".join(f"{key} within {value:.1e}" for key, value in off.items())
            print(f"{strategy:<7} {how:<40} {len(ours) - 1} steps, {shown}", flush=True)


if __name__ == "__main__":
    main()
