#!/usr/bin/env bash
# gpu_check.sh [OUTPUT]: everything that a first look at a GPU machine should tell, within 10 minutes on one H100 or H200.
#
#   1. packages     versions, GPU, which Transformer Engine recipes and attention kernels are there       → machine.json
#   2. tests        tests/gpu, and without them nothing else is believed                                  → tests.json, tests.log
#   3. benchmarks   log-prob kernel, shared prompts, where a step's time goes, FP8 against bf16           → <name>.json
#
# Each part has a time limit and a log; a part that fails does not keep the others from running, and shows in summary.json and
# in the exit code. BENCHMARK_SIZE (default 1.5b; see benchmarks/setup.py), TEST_SECONDS and BENCHMARK_SECONDS change the limits.
set -u
cd "$(dirname "$0")/.."
output=${1:-gpu-check}
mkdir -p "$output"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1 NVTE_FRAMEWORK=pytorch
python=${PYTHON:-python3}
size=${BENCHMARK_SIZE:-1.5b}

part() { # part NAME SECONDS COMMAND…: run it, note seconds and exit code
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  echo "== $name"
  timeout -k 10 "$limit" "$@" >"$output/$name.log" 2>&1
  code=$?
  tail -n 25 "$output/$name.log"
  echo "{\"part\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - started))}" >>"$output/parts.jsonl"
}

rm -f "$output/parts.jsonl"
part machine 60 "$python" -m tests.gpu.machine "$output/machine.json"
part tests "${TEST_SECONDS:-240}" "$python" -m pytest tests/gpu -q -p no:cacheprovider --disable-warnings \
  --junitxml "$output/tests.xml"
for name in logprobs layouts breakdown fp8; do
  part "$name" "${BENCHMARK_SECONDS:-75}" "$python" -m "benchmarks.$name" --size "$size" --repeat 1 --output "$output"
done
"$python" -m tests.gpu.machine --summary "$output"
