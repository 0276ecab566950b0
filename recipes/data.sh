#!/usr/bin/env bash
# Prepare what recipes train on, at 128 and 192 px: bash recipes/data.sh SET... [eyes] [lfw]
#   300W [300W-small]   folders of photos and annotations, merged to one set: 300W+300W-small-192
#   eyes                photos of faces in eyes/closed and eyes/open, without landmarks: joins them
#                       with the landmarks of TEACHER (weights/irnet18.pt)
#   lfw                 photos of faces without landmarks, for --gssl: lfw-192
# DETECTOR (auto, or another one of demo.py --detector) finds the faces of eyes and lfw.
set -eu
[[ $0 != */* ]] || cd "${0%/*}/.."
[ $# -gt 0 ] || { sed -n '2,7s/^# //p' recipes/data.sh >&2; exit 2; }
sets=() others=()
for name; do
    if [ "$name" = eyes ] || [ "$name" = lfw ]; then others+=("$name"); else sets+=("$name"); fi
done
[ ${#sets[@]} -gt 0 ] || { echo "give a set with landmarks first, such as 300W" >&2; exit 2; }
merged=$(IFS=+; echo "${sets[*]}")
detector=${DETECTOR:-auto}
for size in 128 192; do
    python -m utils.data.generator "${sets[@]}" --target-size $size --output-dir "$merged-$size"
    for name in ${others[@]+"${others[@]}"}; do
        if [ "$name" = eyes ]; then
            python -m utils.data.generator eyes --labelled "$merged-$size" --detector "$detector" \
                --teacher "${TEACHER:-weights/irnet18.pt}" --names tools/splits/eyes.txt:train
        else
            python -m utils.data.generator lfw --labelled "$merged-$size" --detector "$detector" \
                --output-dir "lfw-$size"
        fi
    done
done
