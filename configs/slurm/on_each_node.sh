#!/bin/bash
# What srun starts on each machine: accelerate launch with the arguments given here.
#
# SLURM sends signals to this script alone, not to what it starts. USR1 is passed on to the training processes, which
# are the launcher's children: they finish their step, save and end. The launcher itself would die of it, so it is
# started deaf to it. TERM (scancel, preemption) goes to the launcher, which hands it on and waits 30 s.
(trap '' USR1; exec accelerate launch --machine_rank "${SLURM_NODEID:-0}" "$@") &
launcher=$!
trap 'pkill -USR1 -P "$launcher"' USR1
trap 'kill -TERM "$launcher"' TERM

wait "$launcher"
while kill -0 "$launcher" 2>/dev/null; do  # (a signal ends the wait, not the launcher)
    wait "$launcher"
done
wait "$launcher"  # for its exit status
