#!/bin/bash
# Run `accelerate launch` with the given arguments. srun starts this script on each machine.
#
# SLURM sends signals only to this script, not to its child processes. USR1 is forwarded to the training processes,
# which are children of the launcher: they finish the step, save a checkpoint and exit. USR1 would end the launcher, so
# the launcher ignores it. TERM (scancel, preemption) is forwarded to the launcher, which forwards it and waits 30 s.
echo "machine ${SLURM_NODEID:-0} of ${SLURM_NNODES:-1} starts: $(hostname)"  # the log shows which machines have started
(trap '' USR1; exec accelerate launch --machine_rank "${SLURM_NODEID:-0}" "$@") &
launcher=$!
trap 'pkill -USR1 -P "$launcher"' USR1
trap 'kill -TERM "$launcher"' TERM

wait "$launcher"
while kill -0 "$launcher" 2>/dev/null; do  # a signal interrupts wait, not the launcher
    wait "$launcher"
done
wait "$launcher"  # to get its exit status
