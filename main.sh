#!/usr/bin/env bash
# bash main.sh PROCESSES [flags of main.py]
#   one GPU or the CPU:  bash main.sh 1 --train --data samples
#   four GPUs:           bash main.sh 4 --train --test --test-onnx --epochs 120 --batch-size 32
#   two CPU processes:   bash main.sh 2 --train --device cpu
#   two machines, on each with its own NODE_RANK (0, 1), the first machine's address and --exp:
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 bash main.sh 4 --train --exp NAME
# Ctrl-C or SIGTERM: the step is finished and saved. A killed process: all are started again, up to
# MAX_RESTARTS (3) times, and resume by themselves.
set -u
cd "$(dirname "$0")" || exit 2

processes=${1:-none}
shift
# Checks the flags and the number of GPUs, and chooses the experiment, once for all processes.
exp=$(python -m utils.launch "$processes" "$@") || exit $?

if [ -z "$exp" ]; then
    exec python main.py "$@"
fi

launch=(python -m torch.distributed.run --nproc-per-node "$processes"
        --max-restarts "${MAX_RESTARTS:-3}")
if [ "${NNODES:-1}" -gt 1 ]; then
    launch+=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?set NODE_RANK to this machine, 0 to NNODES - 1}"
             --master-addr "${MASTER_ADDR:?set MASTER_ADDR to the first machine}"
             --master-port "${MASTER_PORT:-29500}")
else
    launch+=(--standalone)
fi

# A user's mistake found by a rank is written here; restarted ranks then end at once.
export PIPNET_VERDICT=$(mktemp)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes ))}
stopped=
# The signal goes to the ranks, which finish their step and save, and not to torchrun, which would
# answer with a traceback. setsid keeps Ctrl-C on the terminal from reaching torchrun.
trap 'stopped=yes; pkill -TERM -P "$child" || kill -TERM "$child"' TERM INT
setsid "${launch[@]}" main.py "$@" --exp "$exp" &
child=$!
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
done

if [ -s "$PIPNET_VERDICT" ]; then
    echo "error: $(cat "$PIPNET_VERDICT")" >&2
    status=2
elif [ -n "$stopped" ]; then
    echo "stopped; go on with: bash main.sh $processes $* --exp $exp --resume"
fi
rm -f "$PIPNET_VERDICT"
exit "$status"
