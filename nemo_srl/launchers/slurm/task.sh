#!/bin/bash
# What every Slurm task of a step runs, inside the container if there is one:
#
#   task.sh one COMMAND...        the only task of its step
#   task.sh node COMMAND...       the only task of its node; there are several nodes
#   task.sh rank COMMAND...       one rank of a training
#   task.sh torchrun PYTHON ...   one node of a training, whose ranks torch's launcher starts
#
# The environment holds MASTER_ADDR, MASTER_PORT and NEMO_SRL_RANKS_PER_NODE.
# Fails with status 2 on a node that does not see the run directory.
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
    # A static rendezvous: c10d's can end a successful run with a traceback.
    python=$1
    shift
    set -- "$python" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
      --nproc-per-node="$NEMO_SRL_RANKS_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "$@"
    ;;
esac

# This shell outlives TERM; the command gets TERM as it comes, since a trap is not inherited. A command that
# stops on request, having saved its work, ends with status 75. Passed on, it would have Slurm kill the ranks
# that are still saving: it becomes a file for the batch script to find.
trap : TERM
"$@"
status=$?
if [ "$status" -eq 75 ]; then
  touch "$NEMO_SRL_STOPPED"
  exit 0
fi
exit "$status"
