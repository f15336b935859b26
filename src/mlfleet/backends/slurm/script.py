"""The batch script, which Slurm starts on a node, and the script of the command, which the batch script starts.

The batch script claims the run, starts the command in a session of its own, passes a request to stop on to it, ends
whatever is left of it, and records its exit code. It does so by itself because Slurm ends the processes of a job
reliably only where the administrator has set up cgroups, and because Slurm forgets ended jobs within minutes.

Parameters, variables and secrets are in files of the run's folder, which only the user may read: everybody may read the
arguments of processes, and ``scontrol write batch_script`` shows the batch script to operators.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlfleet._environments.manager import PreparedEnvironment

__all__ = ["array_script", "batch_script", "command_script", "environment_file", "is_left_out"]

# What is read and written: see `mlfleet.backends.slurm.run_files`.
#
# Apart from the command nothing here starts a process or a program unless something has gone wrong or is being
# cancelled: hundreds of jobs may begin and end on a node within seconds.
#
# 1. Claim. The first job that makes the file `claim` (O_EXCL, by `set -C`) owns the run: a submit whose answer was
#    lost may have been repeated. A job that Slurm has started again (requeue) has the same id and a higher restart
#    count, and takes over, unless the command had ended by itself before. Slurm starts a job again also without
#    --requeue, if its node did not answer in time: so the variables stay for as long as the command has not ended by
#    itself.
# 2. The command leads a process group of its own. Job control (`set -m`) makes it one, and starts the command with the
#    usual actions for SIGINT and SIGQUIT, which other background processes of a shell ignore. It is off while this
#    script waits: `wait` would return when the job is suspended.
# 3. `scancel` sends SIGTERM: the trap passes it on, and after the grace in the file `grace` SIGKILL follows. `wait`
#    returns early whenever the trap has run, and is then called again. What sends SIGKILL has a group of its own, so
#    that it can be ended together with its `sleep`.
# 4. The exit code is recorded before the rest is ended: Slurm kills this script, too, after KillWait. It is complete
#    with the end of its line. Messages of bash itself, such as that a process was killed, are not output of the
#    command: they go to Slurm's file.
# 5. What the command has left behind is ended: its group, then all processes of this user with this run and this job in
#    their environment, in whatever session. The id of the job alone does not do, since a job of another cluster may be
#    on the machine; neither does the run alone, whose variable is inherited by jobs that the command submits. Reading
#    the environment of all processes would cost more than all the rest of a short job. Ids of processes rise until they
#    reach pid_max: so those of the job are above this script's by no more than the machine has forked meanwhile, and
#    by what the counter skips since it is in use.
# 6. SIGTERM reaches the processes of a job in any order: a command that died of it may have been asked to stop although
#    this script has not seen the signal yet.
_WRAPPER = r"""
unset SLURM_EXPORT_ENV SLURM_TIME_FORMAT LC_ALL
run=${PWD##*/}
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
count_forks() {
  local name value
  while read -r name value _; do [[ $name = processes ]] && break; done < /proc/stat
  forks=$((value - forks))
}
forks=0
count_forks

set -C
if ! { echo "$job $restarts" > claim; } 2> /dev/null; then
  owner='' count=''
  read -r owner count < claim
  if [ -z "$owner" ]; then
    echo "mlfleet: the run cannot be claimed: see that $PWD can be written, and is not full" >&2
    exit 1
  fi
  if [ "$owner" != "$job" ] || [ "$restarts" -le "${count:-0}" ]; then
    echo "mlfleet: the run was claimed before; this job does nothing" >&2
    exit 0
  fi
  code='' asked=''
  [ -e exit ] && read -r code asked < exit
  [ -n "$code" ] && [ -z "$asked" ] && exit "$code"
  rm -f exit
  echo "$job $restarts" >| claim.new && mv claim.new claim || exit 1
fi
set +C

command='' killer='' asked='' interrupted=''
stop() {
  interrupted=1 asked=1
  local grace=10
  read -r grace < grace
  [ -n "$command" ] || return
  kill -TERM -- "-$command" 2> /dev/null
  kill -CONT -- "-$command" 2> /dev/null
  [ -n "$killer" ] && kill -KILL -- "-$killer" 2> /dev/null
  set -m
  (trap '' TERM; sleep "$grace"; kill -KILL -- "-$command") < /dev/null > /dev/null 2>&1 &
  killer=$!
  set +m
}
trap stop TERM
trap 'interrupted=1' HUP INT

set -m
{
  export MLFLEET_SLURM_RUN=$run
  unset run job restarts forks command killer asked interrupted
  unset -f count_forks stop
  . ./command.sh
} < /dev/null >> output.log 2>&1 &
command=$!
set +m
[ -n "$asked" ] && stop
interrupted=1
while [ -n "$interrupted" ]; do
  interrupted=''
  wait "$command"
  code=$?
done
[ "$code" = 143 ] && asked=1
echo "$code $asked" > exit
trap '' TERM

if kill -TERM -- "-$command" 2> /dev/null; then
  grace=10
  read -r grace < grace
  left=$(ps -eo pgrp=,comm= | while read -r group name; do [ "$group" = "$command" ] && echo "$name"; done)
  [ -n "$asked" ] || echo "mlfleet: the command ended and left ${left//$'\n'/ }, ended now" >> output.log
  kill -CONT -- "-$command" 2> /dev/null
  for _ in $(seq "$(printf '%.0f' "${grace}e1")"); do
    kill -0 -- "-$command" 2> /dev/null || break
    sleep 0.1
  done
  kill -KILL -- "-$command" 2> /dev/null
fi
[ -n "$killer" ] && kill -KILL -- "-$killer" 2> /dev/null
[ -n "$asked" ] || : > environ
count_forks
pid_max=0
read -r pid_max < /proc/sys/kernel/pid_max
first=$$ last=$(($$ + forks + pid_max / 8))
((last < pid_max)) || first=0 last=$pid_max
cd /proc || exit "$code"
for _ in {1..5}; do
  again=''
  for pid in [0-9]*; do
    ((first < pid && pid <= last)) && [[ -O $pid/environ ]] || continue
    environ=''
    IFS= read -r -d '' -N 9999999 environ < "$pid/environ"  # without the NUL characters
    [[ -z $environ && -e $pid/exe ]] && again=1  # it is becoming another program (execve)
    [[ $environ = *"MLFLEET_SLURM_RUN=$run"* ]] || continue
    IFS= read -r -d '' name < "$pid/cmdline"
    [[ $name = slurmstepd* ]] && continue  # Slurm's daemon of the job
    while IFS= read -r -d '' entry; do
      [ "$entry" = "SLURM_JOB_ID=$SLURM_JOB_ID" ] && kill -KILL "$pid" && again=1  # it may have started another one
    done < "$pid/environ"
  done 2> /dev/null
  [ -n "$again" ] || break
  sleep 0.05
done
exit "$code"
"""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FUNCTION = re.compile(r"BASH_FUNC_([A-Za-z0-9_.-]+)%%")
# Variables that bash itself sets and does not let anybody set, and those that describe the machine of the driver.
_LEFT_OUT = {"BASHOPTS", "SHELLOPTS", "UID", "EUID", "PPID", "BASH_VERSINFO", "_", "SHLVL", "PWD", "OLDPWD", "HOSTNAME"}
_LEFT_OUT.add("MLFLEET_SLURM_RUN")
# The devices that Slurm gives a job (https://slurm.schedmd.com/gres.html); those of the driver are other ones.
_LEFT_OUT |= {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"}
_OF_SLURM = ("SLURM_", "SBATCH_", "SLURMD_")

# The names of the script's own variables must not be those of anybody's.
_LOAD = """\
while IFS= read -r -d '' __mlfleet_entry; do
  case $__mlfleet_entry in
    BASH_FUNC_*) eval "${__mlfleet_entry#BASH_FUNC_}" ;;
    *) export "$__mlfleet_entry" ;;
  esac
done < "$__mlfleet_run/environ"
"""


def batch_script(folder: Path) -> str:
    """Return the batch script of one run.

    Args:
        folder: The folder of the run.
    """
    return f"#!/bin/bash\ncd {shlex.quote(str(folder))} || exit 1\n{_WRAPPER}"


def array_script(folder: Path) -> str:
    """Return the batch script of an array, whose tasks find their runs by the links in a folder.

    Args:
        folder: The folder with a link to the run's folder for each index.
    """
    return f'#!/bin/bash\ncd -P {shlex.quote(str(folder))}/"$SLURM_ARRAY_TASK_ID" || exit 1\n{_WRAPPER}'


def command_script(
    folder: Path, project: Path, command: str, *, environment: PreparedEnvironment | None, setup: Sequence[str]
) -> str:
    """Return the script that sets the variables, runs the lines of ``setup`` and becomes the command.

    Args:
        folder: The folder of the run.
        project: The run's copy of the project.
        command: The rendered command, for ``bash -c``.
        environment: The Python environment, which comes before what the lines of ``setup`` add to PATH.
        setup: Lines of bash.
    """
    lines = [f"__mlfleet_run={shlex.quote(str(folder))}", _LOAD + f"cd {shlex.quote(str(project))} || exit 1"]
    for line in setup:
        failed = shlex.quote(f"mlfleet: this line of setup failed: {line}")
        lines.append(f"{{\n:\n{line}\n}} || {{ echo {failed} >&2; exit 1; }}")
    if environment is not None:
        for name, value in environment.environ.items():
            lines.append(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")
        if environment.path:
            lines.append(f"export PATH={shlex.quote(':'.join(environment.path))}${{PATH:+:$PATH}}")
    lines.append(f"unset __mlfleet_run __mlfleet_entry\nexec bash -c {shlex.quote(command)}")
    return "\n".join(lines) + "\n"


def is_left_out(name: str) -> bool:
    """Return True if Slurm or bash sets the variable of that name on the node."""
    return name in _LEFT_OUT or name.startswith(_OF_SLURM)


def environment_file(environ: Mapping[str, str]) -> bytes:
    """Return the file with the variables of the command: ``NAME=value``, each with a NUL character at its end.

    Variables of Slurm are left out, so that the command sees those of its own job. Functions that bash exports (such
    as ``module``) become their definitions.
    """
    entries = []
    for name, value in environ.items():
        function = _FUNCTION.fullmatch(name)
        if function is not None:
            entries.append(f"BASH_FUNC_{function[1]} {value}\nexport -f {function[1]}")
        elif _NAME.fullmatch(name) and not is_left_out(name):
            entries.append(f"{name}={value}")
    return b"".join(entry.encode(errors="surrogateescape") + b"\0" for entry in entries)
