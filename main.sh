#!/usr/bin/env bash
# Train in PROCESSES processes with torchrun: bash main.sh PROCESSES [flags of main.py]
#   one GPU or the CPU:  bash main.sh 1 --train --data-dir samples
#   four GPUs:           bash main.sh 4 --train --test --test-onnx --epochs 120 --batch-size 32
#   two CPU processes:   bash main.sh 2 --train --device cpu
#   two machines: the same line on each, with its own NODE_RANK (0, 1) and the address of the first:
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 bash main.sh 4 --train --exp NAME
# Paths are relative to this folder. Ctrl-C, SIGTERM and a closed terminal finish the step and save;
# a second Ctrl-C ends at once. After a crash all processes restart and resume, up to MAX_RESTARTS
# (3) times.
set -u
[[ $0 != */* ]] || cd "${0%/*}/" || exit 2
processes=${1:-none}
shift
if [ "${NNODES:-1}" = 1 ]; then
    machines=(--standalone)
else
    machines=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-}" --master-addr "${MASTER_ADDR:-}"
              --master-port "${MASTER_PORT:-29500}")
fi
# launch.py checks the flags, runs the command that follows, and handles signals and exit codes.
# The -- keeps torchrun from taking --shut as a short form of its --shutdown-timeout.
exec python -m utils.training.launch "$processes" \
    python -m torch.distributed.run --nproc-per-node "$processes" \
    --max-restarts "${MAX_RESTARTS:-3}" "${machines[@]}" -- main.py "$@"
