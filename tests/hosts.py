"""Two machines on one: Linux namespaces, each with a network, a name, processes and files of its own, joined by a cable.

All that runs on a host ends when it is switched off, and a host is switched off when the test ends, however it ends: it
lives as long as the pipe that it reads from.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
NAMES = ("one", "two")
ADDRESSES = {"one": "10.77.0.1", "two": "10.77.0.2"}
CABLE = "cable"
PORT = 29500
ENTER = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


def why_no_hosts() -> str:
    """Why this machine can have no hosts in it; empty where it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if missing := [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]:
        return f"there is no {' and no '.join(missing)} here (Debian: apt install iproute2 util-linux)"
    tried = subprocess.run([*ENTER, "ip", "link", "add", "type", "veth"], capture_output=True, text=True)
    return f"network namespaces need root: {' '.join(tried.stderr.split())}" if tried.returncode else ""


class Host:
    """A machine that is on.

    Attributes:
        folder: all that this host has and the other does not.
    """

    def __init__(self, name: str, folder: Path, *, names: bool = False) -> None:
        self.name, self.folder = name, folder / name
        others = [folder / other for other in NAMES if other != name]
        for each in (self.folder, *others):
            each.mkdir(parents=True, exist_ok=True)
        setup = [f"hostname {name}", "ip link set lo up", *(f"mount -t tmpfs none '{other}'" for other in others)]
        if names:
            known = "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
            (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            setup.append(f"mount --bind '{self.folder / 'hosts'}' /etc/hosts")
        script = " && ".join([*setup, "echo on", "exec cat"])
        self._started: list[subprocess.Popen[str]] = []
        self._power = subprocess.Popen(
            [*ENTER, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._power.stdout is not None and self._power.stdout.readline() == "on\n"
        [process] = psutil.Process(self._power.pid).children()
        self.pid = process.pid

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Start a program on this host, in its folder; an empty environment variable is left out."""
        environment = {key: value for key, value in environment.items() if value}
        own = {"GPT2LAB_CACHE": str(self.folder / "cache"), "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1"}
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))}
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", f"--wd={self.folder}", "--"]
        process = subprocess.Popen(
            [*enter, *words], env=os.environ | own | paths | environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def do(self, *words: str) -> None:
        """Run a program on this host to its end."""
        _, said = (process := self.start(*words)).communicate()
        assert process.returncode == 0, said

    def torchrun(self, *words: str, processes: int = 1, **environment: str) -> subprocess.Popen[str]:
        """Start ``gpt2lab WORDS`` as this host's part of a torchrun on both."""
        return self.start(
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={processes}",
            f"--node-rank={NAMES.index(self.name)}", f"--master-addr={ADDRESSES['one']}", f"--master-port={PORT}",
            "-m", "gpt2lab", *words, **{"GLOO_SOCKET_IFNAME": CABLE} | environment,
        )  # fmt: skip

    def rank(self) -> dict[str, str]:
        """What a launcher would put into the environment of the only process on this host."""
        place = {"RANK": str(NAMES.index(self.name)), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return place | {"MASTER_ADDR": ADDRESSES["one"], "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": CABLE}

    def unplug(self) -> None:
        """Pull the cable."""
        self.do("ip", "link", "set", CABLE, "down")

    def switch_off(self) -> None:
        """End all that runs here, at once."""
        self._power.kill()  # and with it, by --kill-child, the first process of the host, without which none can be
        self._power.communicate()
        for process in self._started:
            with process:  # its end, and that of its pipes
                pass


@contextmanager
def two_hosts(folder: Path, *, names: bool = False) -> Iterator[tuple[Host, Host]]:
    """Two hosts that are switched on, and off at the end; what is in their folders stays.

    Args:
        names: whether they know each other, and themselves, by name.
    """
    with ExitStack() as at_the_end:
        hosts = []
        for name in NAMES:
            hosts.append(Host(name, folder, names=names))
            at_the_end.callback(hosts[-1].switch_off)
        ends = [["name", CABLE, "netns", str(host.pid)] for host in hosts]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for host in hosts:
            host.do("ip", "address", "add", f"{ADDRESSES[host.name]}/24", "dev", CABLE)
            host.do("ip", "link", "set", CABLE, "up")
        yield hosts[0], hosts[1]
