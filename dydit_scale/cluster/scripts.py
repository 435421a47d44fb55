"""Shell scripts: for Slurm, and for torchrun and deepspeed on machines that one starts by hand."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from dydit_scale.cluster.command import PORT, Job
from dydit_scale.cluster.pod import NEVER_AGAIN
from dydit_scale.train.exits import Exit

INDENT = " \\\n    "


def render_slurm(job: Job) -> str:
    """A batch script that trains until it is done: it stops in time before its limit or a preemption, and puts itself
    back into the queue."""
    spec, times = job.spec, job.times
    settings = {
        "job-name": job.name,
        "nodes": spec.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": spec.gpus,
        "cpus-per-task": spec.cpus,
        "mem": f"{spec.memory_gib}G",
        "time": f"{spec.hours}:00:00",
        "signal": f"B:USR1@{times.grace}",
        "open-mode": "append",
        "output": f"{job.name}-%j.log",
    }
    run = shlex.quote(job.recipe.run)
    settings |= {"partition": spec.queue} if spec.queue else {}
    settings |= {"qos": spec.priority} if spec.priority else {}
    head = [f"#SBATCH --{name}={value}" for name, value in settings.items()] + ["#SBATCH --requeue"]
    never = "|".join(map(str, NEVER_AGAIN))
    rank = 'export PET_NODE_RANK=$SLURM_NODEID; exec "$@"'
    return _lines(
        *head,
        "set -u",
        "",
        "# Asked by Slurm, before the time limit or a preemption: save, leave, and go on later.",
        "asked=0",
        "# Nothing for srun, which answers a SIGTERM by killing all tasks.",
        f"trap {shlex.quote(f'asked=1; dydit stop {run}')} USR1 TERM",
        f'failures="{job.name}-$SLURM_JOB_ID.failures"',
        "",
        *_exports(job.environment | job.rendezvous),
        'PET_MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export PET_MASTER_ADDR",
        "",
        _command(
            ["srun", f"--cpus-per-task={spec.cpus}", "--kill-on-bad-exit=0", "bash", "-c", rank, "node", *job.torchrun]
        )
        + " &",
        "step=$!",
        "# a signal ends wait, not the step; the last wait has the step's own code",
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; done',
        'wait "$step"',
        "code=$?",
        "",
        'case "$code" in',
        "    0) exit 0 ;;",
        f'    {never}) exit "$code" ;;  # a restart would fail again',
        f'    {int(Exit.STOPPED)}) [ "$asked" = 1 ] || exit "$code" ;;  # stopped by a person',
        '    *) echo "$code" >> "$failures"',
        f'       [ "$(wc -l < "$failures")" -le {spec.restarts} ] || exit "$code" ;;',
        "esac",
        'scontrol requeue "$SLURM_JOB_ID"',
    )


def render_torchrun(job: Job) -> str:
    """The same script for every machine, told which one it is."""
    return _lines(
        *_who(job),
        *_exports(job.environment | job.rendezvous | {"PET_MASTER_ADDR": job.spec.host_names[0]}),
        "export PET_NODE_RANK=$node",
        "exec " + _command(job.torchrun),
    )


def render_deepspeed(job: Job) -> str:
    """The same with the deepspeed launcher, which needs no ssh when it is started on every machine; it writes the
    hostfile itself."""
    spec = job.spec
    start: list[str] = ["deepspeed"]
    if spec.nodes == 1:
        return _lines(
            *_exports(job.environment),
            "exec " + _command([*job.supervisor, *start, f"--num_gpus={spec.gpus}", "--module", *job.training]),
        )
    where = ["--no_ssh", "--hostfile=HOSTFILE", "--node_rank=NODE", f"--master_addr={spec.host_names[0]}"]
    words = [*job.supervisor, *start, *where, f"--master_port={PORT}", "--module", *job.training]
    line = _command(words).replace("HOSTFILE", '"$hostfile"', 1).replace("--node_rank=NODE", '--node_rank="$node"', 1)
    return _lines(
        *_who(job),
        *_exports(job.environment),
        "hostfile=$(mktemp)",
        "cat > \"$hostfile\" <<'HOSTS'",
        *(f"{name} slots={spec.gpus}" for name in spec.host_names),
        "HOSTS",
        "exec " + line,
    )


def _who(job: Job) -> Iterable[str]:
    last = job.spec.nodes - 1
    if last == 0:
        return ("node=0",)
    return (
        f"node=${{1:?which machine is this? expected 0 to {last}}}",
        f'[ "$node" -ge 0 ] && [ "$node" -le {last} ] || {{ echo "expected 0 to {last}, got $node" >&2; exit 64; }}',
    )


def _exports(variables: dict[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _command(words: list[str]) -> str:
    """One command, with a line for each step of nested programs."""
    text, starts = "", ("python", "torchrun", "deepspeed", "-m", "--module")
    for number, word in enumerate(words):
        fresh = word in starts and not (word == "-m" and words[number - 1] == "python")
        text += ("" if not number else INDENT if fresh else " ") + shlex.quote(word)
    return text


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"
