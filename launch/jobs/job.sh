set -uo pipefail

start=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
logs=$run/launch/logs/$start
mkdir -p "$logs"
touch "$run/launch/starts"

say() { echo "$(date '+%F %T') $*"; }

step() { # of the latest checkpoint
  local name
  name=$(cat "$run/checkpoints/latest" 2>/dev/null) || name=step-0
  echo $((10#${name#step-}))
}

stuck() { # the last starts, as many as $patience, all began at the step where the run still is
  [ "$(tail -n "$patience" "$run/launch/starts" | awk -v now="$(step)" '$3 == now' | wc -l)" -ge "$patience" ]
}

next= # the job after this one, in a chain
finish() {
  if [ -n "$next" ]; then scancel "$next"; fi
  say "$2"
  exit "$1"
}

say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST, from step $(step)"
if stuck; then finish 1 "$patience starts in a row saved nothing new; giving up. swath launch status $run says more"; fi
echo "$(date '+%FT%T') $start $(step)" >>"$run/launch/starts"
if [ "$mode" = chain ]; then
  if next=$(sbatch --parsable "$script"); then
    say "job $next continues after this one (scancel --name $SLURM_JOB_NAME ends both)"
  else
    say "the next job cannot be submitted from here; submit $script again when this one ends"
  fi
fi

# the environment, but for what may be secret
for name in $(compgen -e | sort); do
  case ${name^^} in *TOKEN* | *KEY* | *SECRET* | *PASS* | *CREDENTIAL* | *AUTH*) continue ;; esac
  case ${!name} in *://*@*) continue ;; esac
  printf '%s=%q\n' "$name" "${!name}"
done >"$logs/environment.txt"

# a job that was killed on another machine still holds the run for two minutes
lease=$run/owner.json
for _ in {1..30}; do
  if [ ! -e "$lease" ] || grep -q "\"host\": \"$(hostname)\"" "$lease"; then break; fi
  if [ $(($(date +%s) - $(stat -c %Y "$lease" 2>/dev/null || echo 0))) -gt 130 ]; then break; fi
  sleep 5
done

# all nodes meet on the first
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
port=$((20000 + (SLURM_JOB_ID + 7 * ${SLURM_RESTART_COUNT:-0}) % 10000))

command=("$python" -m swath.launch.jobs.local --nodes "$SLURM_JOB_NUM_NODES" --processes "$processes"
  --master "$address:$port" --logs "$logs" "${program[@]}")
if [ -n "$container" ]; then
  runtime=$(command -v apptainer || command -v singularity) || finish 1 "no apptainer and no singularity on $first"
  command=("$runtime" exec "${container_options[@]}" "$container" "${command[@]}")
fi

again() { # requeue, unless somebody cancelled the job, or SLURM has requeued it already
  local state
  state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
  if [ "$state" != RUNNING ]; then
    say "SLURM says $state: left to it"
    return
  fi
  scontrol requeue "$SLURM_JOB_ID" || say "this cluster does not requeue; swath launch slurm --continue chain would do"
}

# Before the time limit SLURM sends SIGUSR1 to this script. The ranks save and leave; should they not manage to, the job is
# requeued all the same, from the last checkpoint before: a job that runs into its limit is not requeued by SLURM.
late=
ask() {
  say "asked to stop: the ranks save after the step in hand"
  kill -USR1 "$srun" 2>/dev/null
  if [ "$mode" = requeue ] && [ -z "$late" ]; then
    (sleep $((stop_before - 30)) && say "still not stopped: requeued" && again) &
    late=$!
  fi
}
trap ask USR1 TERM
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=0 --export=ALL \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} "${command[@]}" </dev/null &
srun=$!
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done # a signal ends a wait
wait "$srun"
code=$?
trap '' USR1 TERM
if [ -n "$late" ]; then kill "$late" 2>/dev/null; fi

# refused while another process holds the run: one on a node that SLURM has lost, perhaps, which goes on; try again later
if [ -e "$logs/refused" ] && [ ! -e "$lease" ]; then finish 2 "the run refused its input; the reason is above"; fi
if [ $code = 0 ] && [ ! -e "$logs/stopped" ]; then finish 0 "done"; fi
if [ $code = 0 ]; then why="stopped after step $(step)"; else why="ended with exit code $code, last checkpoint of step $(step)"; fi
if stuck; then finish 1 "$why: $patience starts in a row saved nothing new; giving up"; fi
if [ "$mode" = chain ]; then
  say "$why; job ${next:-?} continues"
  exit $code
fi
say "$why; to be requeued"
again
sleep 60 # a requeue ends this script
if [ $code = 0 ]; then code=85; fi
exit $code
