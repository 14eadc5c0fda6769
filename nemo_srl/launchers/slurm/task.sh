#!/bin/bash
# What every Slurm task of a step runs, inside the container if there is one:
#
#   task.sh one COMMAND...        the only task of its step
#   task.sh node COMMAND...       the only task of its node; there are several nodes
#   task.sh rank COMMAND...       one rank of a training
#   task.sh torchrun PYTHON ...   one node of a training, whose ranks torch's launcher starts
#
# The environment holds MASTER_ADDR, MASTER_PORT, NEMO_SRL_RANKS_PER_NODE and the paths, times and token used below.
# Ends with status 2 on a node that does not see the run directory.
set -u

# A network file system may show a new file late. To list the directory makes it ask its server again.
while [ "$(cat "$NEMO_SRL_CANARY" 2> /dev/null)" != "$NEMO_SRL_TOKEN" ]; do
  if [ "$SECONDS" -ge "$NEMO_SRL_VISIBLE_SECONDS" ]; then
    echo "error: $(hostname) does not see $NEMO_SRL_CANARY: run_dir must lie on a file system that all nodes" \
      "share (and be visible in the container: cluster.mounts)" >&2
    exit 2
  fi
  sleep 0.5
  ls "$(dirname "$NEMO_SRL_CANARY")" > /dev/null 2>&1
done

# A container may lack the home directory of its user. And compiled kernels belong on the node's own storage.
scratch=/tmp
if [ -w "${TMPDIR:-}" ]; then scratch=$TMPDIR; fi
for name in HOME XDG_CACHE_HOME TRITON_CACHE_DIR; do
  directory=${!name:-}
  if [ -z "$directory" ] || ! mkdir -p "$directory" 2> /dev/null || [ ! -w "$directory" ]; then
    export "$name=$scratch/nemo_srl-$(id -u)/$name"
    mkdir -p "${!name}"
  fi
done

kind=$1
shift
case $kind in
  node)
    export GROUP_RANK=$SLURM_NODEID
    ;;
  rank)
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=$NEMO_SRL_RANKS_PER_NODE GROUP_RANK=$SLURM_NODEID
    ;;
  torchrun)
    # This is torchrun's static rendezvous. The one of c10d can end a successful run with a traceback. torchrun takes the
    # place of this shell, because it passes TERM on itself, and a second TERM would make it leave its ranks.
    # It gives the ranks this time to save. An older torch does not know the variable, and gives them 30 s.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
    python=$1
    shift
    exec "$python" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
      --nproc-per-node="$NEMO_SRL_RANKS_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "$@"
    ;;
esac

# With cgroups, Slurm sends TERM to this shell alone, and otherwise to the command as well. So it is passed on, a second
# later: a command that got it as well may be about to end, and a second TERM would kill Python while it ends. One that
# is still saving takes it for the first. A command that saved its work and stopped because of TERM ends with status
# 75. With such a status, Slurm would kill the ranks that are still saving. So a file tells the batch script, and this
# task ends with status 0.
#
# Not with `wait` alone: bash 5.2 loses the status of a command that ends while a trapped signal interrupts `wait`.
told=''
trap 'told=1' TERM
"$@" &
child=$!
while kill -0 "$child" 2> /dev/null; do
  if [ -n "$told" ]; then
    told=''
    sleep 1
    kill -TERM "$child" 2> /dev/null
  fi
  sleep 0.5
done
trap '' TERM
wait "$child"
status=$?
if [ "$status" -eq 75 ]; then
  touch "$NEMO_SRL_STOPPED"
  exit 0
fi
exit "$status"
