"""What is hit: a job on a cluster in a box, the S3 server that it reads from, and the disk of its run."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.faults.proxy import RCLONE, FaultProxy, s3_server, s3_variables
from tests.tiny_run import tiny_config
from tools.cluster import Cluster, no_cluster, running_cluster

NODES = ("node1", "node2", "node3", "node4")
RANKS = 3  # so that one node is spare
BUCKET = "rehearsal"
DISK_MB = 2000
HANG_S = 20
# For slurm/site.sh. No node is sick, and two cores check three nodes slowly.
SITE = {"MAX_FAILURES": "1000", "MAX_REQUEUES": "1000", "HEALTH_SECONDS": "0"}


class Box:
    """A cluster, a server and a disk. number: of the job that is hit. away: nodes without power."""

    def __init__(self, folder: Path, cluster: Cluster, proxy: FaultProxy) -> None:
        self.folder, self.cluster, self.proxy = folder, cluster, proxy
        self.disk, self.bucket = folder / "disk", folder / "s3" / BUCKET
        self.number = ""
        self.away: set[str] = set()

    def submit(self, config: Path, audit: Path, step_seconds: float = 0.0) -> None:
        """Submit the job script of the project, with a rank on each of three nodes.

        audit: where the ranks record what they train on. step_seconds: by which every step is longer.
        """
        variables = {"CONFIG": str(config), "AUDIT": str(audit), "STEP_SECONDS": str(step_seconds)}
        self.number = self.cluster.sbatch("pretrain_wavcaps", nodes=str(RANKS), **variables)

    def fit(self, job: dict[str, str]) -> None:
        """What an operator does with a waiting job: it asks for no more nodes than there are, and is not held."""
        if job["JobState"] != "PENDING":
            return
        wanted = str(max(1, min(RANKS, len(NODES) - len(self.away))))
        if job["NumNodes"].split("-")[0] != wanted:
            self.change(f"NumNodes={wanted}", f"NumTasks={wanted}")
        if "held" in job["Reason"].lower():
            self.cluster.call("scontrol", "release", self.number)

    def change(self, *words: str) -> None:
        """Change the waiting job; one that has just been started cannot be."""
        command = ["scontrol", "update", f"JobId={self.number}", *words]
        subprocess.run(command, env=self.cluster.environment, capture_output=True, timeout=60)

    def ranks(self) -> list[psutil.Process]:
        """The processes of the job's ranks, by rank."""
        found = [(environ, p) for environ, p in self._processes() if p.cmdline()[1:3] == ["-m", "atr_scale.train"]]
        return [process for _, process in sorted(found, key=lambda each: int(each[0]["SLURM_PROCID"]))]

    def workers(self) -> list[psutil.Process]:
        """The loader workers of all ranks: the fork server of a rank is their parent."""
        return [child for rank in self.ranks() for server in rank.children() for child in server.children()]

    def launchers(self) -> list[psutil.Process]:
        """The srun that has started the ranks; it consists of two processes."""
        return [
            p for _, p in self._processes(of_a_task=False) if p.name() == "srun" and "atr_scale.train" in p.cmdline()
        ]

    def _processes(self, of_a_task: bool = True) -> Iterator[tuple[dict[str, str], psutil.Process]]:
        """The processes of the job, with their environment."""
        for process in psutil.process_iter():
            try:
                environ = process.environ()
                own = environ.get("SLURM_JOB_ID") == self.number and environ.get("SLURM_CONF", "").startswith(
                    str(self.cluster.folder)
                )
                if own and process.status() != psutil.STATUS_ZOMBIE and ("SLURM_PROCID" in environ) >= of_a_task:
                    process.cmdline()
                    yield environ, process
            except (psutil.Error, OSError):
                continue

    def fill(self) -> None:
        """No byte is left on the disk."""
        used = os.statvfs(self.disk)
        kib = (used.f_blocks - used.f_bfree) * used.f_frsize // 1024
        self._resize(f"{kib}k")

    def empty(self) -> None:
        """There is space again."""
        self._resize(f"{DISK_MB}m")

    def _resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.disk], check=True)


def no_box() -> str | None:
    """Why there can be no rehearsal on this machine; None if there can be one."""
    missing = None if RCLONE.exists() else f"no {RCLONE}, an S3 server: .ci/rclone installs it"
    return no_cluster() or missing


@contextmanager
def open_box(folder: Path, damage: random.Random) -> Iterator[Box]:
    """A box in the new folder `folder`. Its bucket has inputs of a tiny training, some of them damaged."""
    disk, bucket = folder / "disk", folder / "s3" / BUCKET
    disk.mkdir(parents=True)
    tiny_config(bucket, folder / "unused")
    damage_shards(bucket / "train" / "shards", damage)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", disk], check=True)
    try:
        with s3_server(folder / "s3") as server, running_cluster(folder / "lab", len(NODES)) as cluster:
            proxy = FaultProxy(server, cluster.head)
            cluster.environment |= SITE | s3_variables(proxy) | {"ATR_SCALE_SCRATCH": f"{disk}/$SLURMD_NODENAME"}
            try:
                yield Box(folder, cluster, proxy)
            finally:
                proxy.close()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def damage_shards(shards: Path, draw: random.Random) -> None:
    """Cut one shard, flip a byte in the headers of another, and remove the manifest, which would tell of both.

    What cannot be read is then left out of the index of the shards. With a manifest it would leave holes in batches,
    which are filled with rows of the same rank: the loss would depend on the number of ranks.
    """
    cut, flipped = draw.sample(sorted(shards.glob("*.tar")), 2)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: int(len(whole) * draw.uniform(0.3, 0.8))])
    content = bytearray(flipped.read_bytes())
    header = content.rindex(b"ustar") - 257
    content[header + draw.randrange(100)] ^= 0x40
    flipped.write_bytes(content)
    (shards / "manifest.json").unlink()
