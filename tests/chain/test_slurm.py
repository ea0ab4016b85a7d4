"""script/slurm.sh over two nodes that are both this machine. torchrun, Ray, ms-swift and verl are real, srun and
scontrol are played."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As Slurm's: once on the node that is named, otherwise once on each node. The job's environment is passed on.
SRUN = """#!/usr/bin/env bash
number=2
while [[ "$1" == --* ]]; do [[ "$1" != --nodelist=* ]] || number=1; shift; done
echo "$number: $*" >> "$SRUN_LOG"
for ((rank = 0; rank < number; rank++)); do SLURM_NODEID="$rank" "$@" & pids+=($!); done
trap 'kill "${pids[@]}" 2> /dev/null' TERM
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "${status:-0}"
"""
SCONTROL = "#!/usr/bin/env bash\nprintf '127.0.0.1\\n127.0.0.1\\n'\n"


@pytest.mark.timeout(1500)
def test_a_recipe_over_two_nodes_trains_with_both_and_leaves_nothing_running(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = {"RAY_PORT": str(one.getsockname()[1]), "MASTER_PORT": str(other.getsockname()[1])}
    run_dir = tmp_path / "run"
    environment = {
        **os.environ,
        **{"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SRUN_LOG": str(tmp_path / "srun.log"), **ports},
        **{"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable},
        **{"RUN_DIR": str(run_dir), "QUICK": "1", "SFT_MICRO_BATCH": "6", "SFT_MAX_STEPS": "4", "RL_STEPS": "1"},
        **{"RL_WORKERS": "1", "RAY_START_ARGS": "--num-cpus=10 --num-gpus=1 --object-store-memory=200000000"},
    }
    command = ["bash", str(ROOT / "script" / "slurm.sh"), "tiny-cpu", "data", "sft", "rl"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    logs = "".join(file.read_text()[-3000:] for file in run_dir.glob("logs/*.log"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:] + logs
    assert "2: bash -c" in (tmp_path / "srun.log").read_text(), "SFT is started on each node"
    state = json.loads((run_dir / "sft" / "last" / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and (run_dir / "sft/last").is_dir()
    ranks = sorted((run_dir / "rl" / "global_step_1" / "actor").glob("model_world_size_2_rank_*.pt"))
    assert len(ranks) == 2, "a training process on each of two nodes"
    commands = [file.read_bytes().decode(errors="replace") for file in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [words for words in commands if f":{ports['RAY_PORT']}" in words]
