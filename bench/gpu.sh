#!/usr/bin/env bash
# On one GPU, within nine minutes: fill the GPU tables of bench/README.md.
#   bash bench/gpu.sh          the card; needs requirements.txt and tests/requirements-peers.txt
#   bash bench/gpu.sh --dry    the same parts at toy size on the CPU
# The checks come first. Each part is a process with a time limit of its own, and writes OUT/PART.json and OUT/PART.log.
# If a part fails or runs out of time, its JSON file holds the message, and the next part starts. OUT/tables.md holds the
# tables. Settings: OUT, the folder (default: run/gpu, with --dry run/gpu-dry); PARTS, the parts to run (default: all);
# PYTHON, the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  "") out=${OUT:-run/gpu} ;;
  --dry) out=${OUT:-run/gpu-dry} ;;
  --help) sed -n '2,8s/^# //p' bench/gpu.sh; exit ;;
  *) echo "gpu.sh: $1: expected nothing, --dry or --help" >&2; exit 2 ;;
esac
python=${PYTHON:-python}
if [ -z "${1:-}" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: no GPU found; --dry runs the same parts at toy size on the CPU" >&2
  exit 2
fi
total=530 # seconds
most=${MOST:-$total}
mkdir -p "$out"

failed() { # the part's name, its exit code: write the message
  tail -n 5 "$out/$1.log" | python3 -c 'import json, sys
name, code = sys.argv[1:]
why = {"124": "out of time", "137": "killed"}.get(code, f"exit code {code}")
print(json.dumps({"part": name, "failed": why, "message": sys.stdin.read().strip()}))' "$1" "$2" > "$out/$1.json"
  echo "failed: $(cat "$out/$1.json")"
}

part() { # name, seconds, program and arguments; its last line is JSON
  local name=$1 limit=$2 left=$((total - SECONDS)) code
  shift 2
  case " ${PARTS:-$name} " in *" $name "*) ;; *) return ;; esac
  rm -f "$out/$name.json"
  limit=$((limit < left ? limit : left))
  limit=$((limit < most ? limit : most))
  echo "== $name, at $SECONDS s, at most $limit s: $*"
  if ((limit < 1)); then
    echo "no time is left" > "$out/$name.log"
    failed "$name" 124
    return
  fi
  timeout -s INT -k 10 "$limit" "$python" "$@" > "$out/$name.log" 2>&1
  code=$?
  if ((code)) || ! tail -n 1 "$out/$name.log" | python3 -m json.tool > /dev/null 2>&1; then
    failed "$name" "$code"
    return
  fi
  tail -n 1 "$out/$name.log" > "$out/$name.json"
  tail -n 6 "$out/$name.log" | head -n 5 | cut -c 1-200
}

if [ "${1:-}" = --dry ]; then
  export CUDA_VISIBLE_DEVICES=
  small="--threads 1 --shape tiny"
  # shellcheck disable=SC2086
  {
    part check 60 bench/floors.py check $small
    part step-7b 60 bench/floors.py step $small --rows 1 8 --prompt 40 --tokens 4
    part train-7b 60 bench/floors.py train $small --tokens 128 --length 64 --lora 4
    part grpo-7b 60 bench/floors.py grpo $small --questions 2 --group 2 --lora 4 --micro-tokens 512
    part rollout-0.5b 60 bench/rollout.py $small --questions 2 --group 2 --rounds 1 --sides ours reprefill kept_shared
    part memory-7b 60 bench/memory.py --shape tiny --device cpu --lora 4 --questions 2 --group 2 --sim-rows 4 \
      --trace-tokens 1024 --micro-tokens 1024 --turn-tokens 8 --max-turns 2
  }
else
  command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  part check 60 bench/floors.py check --shape 0.5b
  for shape in 7b 0.5b 1.5b; do
    part "step-$shape" 60 bench/floors.py step --shape $shape --rows 1 64 256 --prompt 790
  done
  part train-3b 45 bench/floors.py train --shape 3b
  part train-7b 45 bench/floors.py train --shape 7b --lora 16
  part grpo-1.5b 60 bench/floors.py grpo --shape 1.5b
  part grpo-7b 75 bench/floors.py grpo --shape 7b --lora 16
  part memory-0.5b 75 bench/memory.py --shape 0.5b --turn-tokens 64 --max-turns 2
  part rollout-0.5b 60 bench/rollout.py --shape 0.5b --questions 8 --group 8 --rounds 1 --threads 8 \
    --sides ours reprefill kept_shared --no-greedy-check
  part memory-7b 150 bench/memory.py --shape 7b --lora 16 --turn-tokens 64 --max-turns 2
fi
"$python" bench/floors.py tables "$out" > "$out/tables.md" && cat "$out/tables.md"
case " ${PARTS:-check} " in
  *" check "*) grep -q '"ok": true, "greedy"' "$out/check.json" || echo "A CHECK HAS FAILED: see $out/check.json" ;;
esac
echo "done after $SECONDS s; $out"
