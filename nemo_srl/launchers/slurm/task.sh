#!/bin/bash
# What every Slurm task of a step runs, inside the container if there is one:
#
#   task.sh one COMMAND...        the only task of its step
#   task.sh node COMMAND...       the only task of its node; there are several nodes
#   task.sh rank COMMAND...       one rank of a training
#   task.sh torchrun PYTHON ...   one node of a training, whose ranks torch's launcher starts
#
# The environment holds MASTER_ADDR, MASTER_PORT, NEMO_SRL_RANKS_PER_NODE and the paths and token used below.
# Ends with status 2 on a node that does not see the run directory.
set -u

if [ "$(cat "$NEMO_SRL_CANARY" 2> /dev/null)" != "$NEMO_SRL_TOKEN" ]; then
  echo "error: $(hostname) does not see $NEMO_SRL_CANARY: run_dir must lie on a file system that all nodes" \
    "share (and be visible in the container: cluster.mounts)" >&2
  exit 2
fi

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
    # This is torchrun's static rendezvous. The one of c10d can end a successful run with a traceback.
    python=$1
    shift
    set -- "$python" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
      --nproc-per-node="$NEMO_SRL_RANKS_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "$@"
    ;;
esac

# This shell must outlive TERM. The command does get TERM, because a trap is not inherited. A command that saved its work
# and stopped because of TERM ends with status 75. With such a status, Slurm would kill the ranks that are still saving.
# So a file tells the batch script, and this task ends with status 0.
trap : TERM
"$@"
status=$?
if [ "$status" -eq 75 ]; then
  touch "$NEMO_SRL_STOPPED"
  exit 0
fi
exit "$status"
