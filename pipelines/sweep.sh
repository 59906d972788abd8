#!/usr/bin/env bash
# Several plans and operators of one store: the model runs once to capture, each combination is fitted from the store,
# and all are measured together in one pass.
# Usage:  MODEL=models/llama OUT=runs/sweep pipelines/sweep.sh
# The same command goes on after an interruption. PLANS and OPERATORS take others, separated by semicolons.
set -euo pipefail

: "${MODEL:?set MODEL to a checkpoint folder}" "${OUT:?set OUT to a folder}"
PLANS="${PLANS:-4;6;8}" OPERATORS="${OPERATORS:-ghost;least-squares;diagonal}"
CALIBRATION="${CALIBRATION:-wikitext2:train}" TEXT="${TEXT:-wikitext2:test}"

mkdir -p "$OUT"
ghoststream capture "$MODEL" --calibration "$CALIBRATION" --sequences 128 --length 512 --store "$OUT/store"
fitted=()
while read -r -d ';' remove; do
    plan="$OUT/plan-$remove.json"
    ghoststream select --store "$OUT/store" --remove "$remove" --out "$plan"
    while read -r -d ';' operator; do
        file="$OUT/$operator-$remove.safetensors"
        ghoststream fit --store "$OUT/store" --plan "$plan" --operator "$operator" --out "$file"
        fitted+=("$file")
    done <<< "$OPERATORS;"
done <<< "$PLANS;"
ghoststream evaluate "$MODEL" "${fitted[@]}" --text "$TEXT" --length 512 --out "$OUT/evaluation.json"
