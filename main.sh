#!/usr/bin/env bash
# bash main.sh PROCESSES [flags of main.py]
#   one GPU or the CPU:  bash main.sh 1 --train --data samples
#   four GPUs:           bash main.sh 4 --train --test --test-onnx --epochs 120 --batch-size 32
#   two CPU processes:   bash main.sh 2 --train --device cpu
#   two machines: the same line on each, with its own NODE_RANK (0, 1) and the first one's address:
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 bash main.sh 4 --train --exp NAME
# Paths are relative to this file's folder, wherever the line is typed.
# Ctrl-C, SIGTERM or a closed terminal: the step is finished and saved, the exit code is 128 plus the signal's number;
# twice: ends at once. A killed process: all are started again, up to MAX_RESTARTS (3) times, and resume by themselves.
set -u
cd "$(dirname "$0")" || exit 2

processes=${1:-none}
shift
# Checks the flags and the number of GPUs, and chooses the experiment, once for all processes.
exp=$(python -m utils.training.launch "$processes" "$@") || exit $?

if [ -z "$exp" ]; then
    exec python main.py "$@"
fi

launch=(python -m torch.distributed.run --nproc-per-node "$processes"
        --max-restarts "${MAX_RESTARTS:-3}")
if [ "${NNODES:-1}" -gt 1 ]; then
    launch+=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?set it to this machine, 0 to NNODES - 1}"
             --master-addr "${MASTER_ADDR:?set it to the address of the first machine}"
             --master-port "${MASTER_PORT:-29500}")
else
    launch+=(--standalone)
fi
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( (cores + processes - 1) / processes ))}

# How main.sh and its processes talk: see utils/training/launch.py.
PIPNET_CONTROL=$(mktemp -d) || exit 2
export PIPNET_CONTROL
interrupted=
# Another machine was asked to stop: as if this one had been.
ended=143
# torchrun would answer a signal with a traceback; setsid keeps the terminal's Ctrl-C from it.
stop() {
    interrupted=yes
    ended=$((128 + $1))
    if [ -e "$PIPNET_CONTROL/stop" ]; then
        # Asked twice: at once, and torchrun held still so that it does not report its dead.
        : > "$PIPNET_CONTROL/stopped"
        kill -STOP "$child"; pkill -KILL -P "$child"; kill -KILL "$child"
    fi
    : > "$PIPNET_CONTROL/stop"
}
# The terminal was closed: the processes must not print there either.
hangup() {
    exec > /dev/null 2>&1
    pkill -HUP -P "$child"
    stop 1
}
trap 'stop 15' TERM
trap 'stop 2' INT
trap hangup HUP
# Before a --, torchrun would take --shut for its own --shutdown-timeout, written shorter.
setsid "${launch[@]}" -- main.py "$@" --exp "$exp" &
child=$!
# A signal ends `wait` early, and then it is to wait again.
while wait "$child" 2>/dev/null; status=$?; [ -n "$interrupted" ]; do interrupted=; done

if [ -e "$PIPNET_CONTROL/error" ]; then
    echo "error: $(cat "$PIPNET_CONTROL/error")" >&2
    status=2
elif [ -e "$PIPNET_CONTROL/stopped" ]; then
    again=" $* "
    [[ $again == *" --exp "* || $again == *" --exp="* ]] || again+="--exp $exp "
    [[ $again == *" --resume "* ]] || again+="--resume"
    status=$ended
    # The folder is the first machine's.
    if [ -e "weights/$exp/last.pt" ] || [ "${NODE_RANK:-0}" != 0 ]; then
        echo "stopped; go on with: bash main.sh $processes$again" 2>/dev/null
    else
        echo "stopped before anything was saved" 2>/dev/null
    fi
fi
rm -r "$PIPNET_CONTROL"
# Where it failed before anything was written.
rmdir "weights/$exp" 2>/dev/null
exit "$status"
