#!/usr/bin/env bash
# Use ten minutes of a rented GPU: check, measure and train. It needs no network.
#   bash rental.sh OUTPUT [--seconds 585] [--device cpu] [--quick]
# It lies beside payload.tar, which `python -m tools.benchmark.rental pack` writes. OUTPUT gets
# rental.log, gpu.md and gpu.jsonl as they come, and the trained model at the end. Each stage has to
# end at a given second; one that ends early leaves its time to the training. --seconds scales all.
# --device cpu --quick is a test of this script.
set -u
here=$(cd "$(dirname "$0")" && pwd)
output=${1:?usage: bash rental.sh OUTPUT [--seconds N] [--device cpu] [--quick]}
shift
seconds=585 options=()
while [ $# -gt 0 ]; do
    case $1 in
        --seconds) seconds=$2; shift 2 ;;
        --device) options+=(--device "$2"); shift 2 ;;
        --quick) options+=(--quick); shift ;;
        *) echo "error: rental.sh: unknown flag $1" >&2; exit 2 ;;
    esac
done
mkdir -p "$output" && output=$(cd "$output" && pwd) || exit 2
exec > >(tee -a "$output/rental.log") 2>&1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(command -v python3 || command -v python)

left() { echo $(($1 * seconds / 585 - SECONDS)); }  # Seconds until that one of 585.

# stage NAME END COMMAND...: run a command that has to end at second END; ended by force 5 s later.
stage() {
    local name=$1 rest
    rest=$(left "$2")
    shift 2
    echo "== $name: second $SECONDS, $rest s"
    if [ "$rest" -lt 1 ]; then
        echo "== $name: left out, the time is up"
        return 1
    fi
    timeout -s TERM -k 5 "$rest" "$@"
    local code=$?
    echo "== $name: ends at second $SECONDS with exit code $code"
    return $code
}

stage unpack 15 tar -xf "$here/payload.tar" -C "$work" || exit 1
cd "$work" || exit 1
benchmark=("$python" -m tools.benchmark.gpu --data-dir faces "${options[@]}")
stage verify 70 "${benchmark[@]}" --only tests resume --seconds "$(left 64)" \
    --output "$output/checks.md"
stage measure 180 "${benchmark[@]}" --only recipe epochs kernels speed variants \
    --seconds "$(left 174)" --output "$output/gpu.md"
flags=$("$python" -m tools.benchmark.rental plan --figures "$output/gpu.jsonl" --data-dir faces \
    --seconds "$(left 570)" "${options[@]}") &&
    echo "main.py --train --test --test-onnx $flags" &&
    eval "flags=($flags)" &&
    stage train 570 "$python" main.py --train --test --test-onnx --exp rental "${flags[@]}"
stage copy 585 "$python" -m tools.benchmark.rental collect --exp weights/rental \
    --output "$output/rental"
