#!/usr/bin/env bash
# On one GPU, within nine minutes: compare rollouts (rollout.py), and measure which share of the copy bandwidth a decode
# step uses (floors.py). It needs requirements.txt and tests/requirements-peers.txt.
#   bash bench/gpu.sh
# The most informative runs come first. Runs that don't fit into the time are named and skipped. Results: gpu.jsonl.
# Rehearsal on a CPU: SHAPES="tiny" ROWS="2 9" THREADS=1 bash bench/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
shapes=${SHAPES:-7b 0.5b 1.5b}
rows=${ROWS:-64 256}
out=${OUT:-.}
mkdir -p "$out"
: > "$out/gpu.jsonl"
limit=530 # seconds

try() { # a program and its arguments, with the time that is left; its last line is JSON
  local left=$((limit - SECONDS)) lines
  if ((left < 20)); then
    echo "left out, no time: $*"
    return
  fi
  echo "== $* (at $SECONDS s)"
  lines=$(timeout "$left" python "$@") || { echo "failed or out of time: $*"; printf '%s\n' "$lines"; return; }
  printf '%s\n' "$lines"
  printf '%s\n' "$lines" | tail -n 1 >> "$out/gpu.jsonl"
}

date -u
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
for shape in $shapes; do
  # shellcheck disable=SC2086
  try bench/floors.py step --shape "$shape" --rows 1 $rows --prompt 790
done
first=1
for n in $rows; do # a group of 8
  for shape in $shapes; do
    if ((first)) && [ "$shape" != 7b ]; then check=""; else check="--no-greedy-check"; fi
    [ -z "$check" ] && first=0
    # shellcheck disable=SC2086
    try bench/rollout.py --shape "$shape" --questions $(((n + 7) / 8)) --group 8 --rounds $((n > 64 ? 1 : 3)) \
      --sides ours reprefill kept_shared --threads "${THREADS:-8}" $check
  done
done
echo "done after $SECONDS s; $out/gpu.jsonl"
