#!/bin/bash
# Removes an image that pyxis unpacked on this node under a name: remove_container.sh NAME
#
# With pyxis's default, `container_scope=global`, nobody else does. With `container_scope=job`, the name also has the
# number of the job.
for name in "pyxis_$1" "pyxis_${SLURM_JOB_ID}_$1"; do
  enroot remove --force "$name" > /dev/null 2>&1
done
exit 0
