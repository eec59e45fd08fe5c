"""A SLURM cluster on this machine, to which jobs are submitted as users do; for tests and for tools.

tools/slurm_lab.sh makes the nodes: network, process and mount namespaces of this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from atr_scale.errors import Failure

ROOT = Path(__file__).parents[1]
LAB = ROOT / "tools/slurm_lab.sh"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "nsenter", "ip")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def no_cluster() -> str | None:
    """Why there can be no cluster on this machine; None if there can be one."""
    if os.geteuid() != 0:
        return "a cluster in a box needs root"
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


class Cluster:
    """The nodes of a lab in `folder`. Names: node1, node2, ...

    variables: further environment of what is submitted.
    """

    def __init__(self, folder: Path, root: Path = ROOT, **variables: str) -> None:
        self.folder, self.root = folder, root
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.environment = inherited | {
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "INTERFACE": "eth0",
            "HEALTH_SECONDS": "120",
            **variables,
        }

    @property
    def head(self) -> str:
        """The address of this machine, as the nodes see it."""
        (address,) = re.findall(r"SlurmctldHost=.*\((.*)\)", (self.folder / "slurm.conf").read_text(encoding="utf-8"))
        return str(address)

    def call(self, *command: str, **variables: str) -> str:
        """What a command prints. Raises Failure if it fails."""
        environment = self.environment | variables
        result = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=120)
        if result.returncode != 0:
            raise Failure(f"{command}: {result.stderr}")
        return result.stdout.strip()

    def submit(self, config: Path, *overrides: str, **variables: str) -> str:
        return self.sbatch("pretrain_wavcaps", *overrides, CONFIG=str(config), **variables)

    def sbatch(
        self,
        script: str,
        *arguments: str,
        after: str | None = None,
        nodes: str = "2",
        **variables: str,
    ) -> str:
        """Nodes without GPUs, a rank on each, once the job `after` has succeeded; the job's number.

        nodes: how many, or "least-most" for train.sh, of which each start takes as many as are free.
        """
        size = [f"--nodes={nodes}", "--gpus-per-node=0", "--cpus-per-task=1"]
        if "-" not in nodes:
            size.append("--ntasks-per-node=1")
        log = f"--output={self.folder}/job-%j.log"
        order = [f"--dependency=afterok:{after}"] if after else []
        path = str(self.root / f"slurm/{script}.sh")
        return self.call("sbatch", "--parsable", *size, *order, log, path, *arguments, **variables)

    def idle(self) -> int:
        """How many nodes have nothing to do."""
        return int(self.call("sinfo", "--noheader", "--states=idle", "--format=%D") or 0)

    def lab(self, action: str, node: str) -> None:
        """What happens to a node, such as node2: see tools/slurm_lab.sh."""
        self.call(str(LAB), str(self.folder), action, node.removeprefix("node"))

    def nodes(self, number: str) -> list[str]:
        """The nodes of a job."""
        return self.call("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, NodeList, ..."""
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, number: str) -> str:
        path = self.folder / f"job-{number}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def last_line(self, number: str) -> str:
        return self.log(number).splitlines()[-1]

    def wait(self, number: str, reached: Callable[[], bool], seconds: float = 300) -> None:
        """Wait until `reached` is true. Raises Failure, with the job's log, if that takes longer."""
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                raise Failure(f"not reached within {seconds} s: {self.job(number)}\n{self.log(number)}")
            time.sleep(0.3)

    def finish(self, number: str, seconds: float = 300) -> dict[str, str]:
        """Wait for the end of a job; its last state. Raises Failure if that takes longer."""
        self.wait(number, lambda: self.job(number)["JobState"] in OVER, seconds)
        return self.job(number)


@contextmanager
def running_cluster(folder: Path, nodes: int, root: Path = ROOT, **variables: str) -> Iterator[Cluster]:
    """A new cluster of so many nodes. At the end all that runs on them is ended."""
    for path in root.glob(".failures-*"):  # of an earlier cluster, whose jobs had the same numbers
        path.unlink()
    try:
        subprocess.run([LAB, folder, "start", str(nodes)], check=True, timeout=240)
        yield Cluster(folder, root, **variables)
    finally:
        subprocess.run([LAB, folder, "stop"], check=True, timeout=120)
