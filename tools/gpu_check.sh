#!/usr/bin/env bash
# gpu_check.sh [OUTPUT]: everything that a first look at a GPU machine should tell, in less than 10 minutes.
#
#   1. packages     versions, GPU, which Transformer Engine recipes and attention kernels are there       → machine.json
#   2. tests        tests/gpu, and without them nothing else is believed                                  → tests.json
#   3. benchmarks   where a step's time goes, shared prompts, log-prob kernel, FP8 against bf16           → <name>.json
#
# Each part has a time limit, and writes to check.log; a part that fails does not keep the others from running, and shows in
# summary.json and in the exit code. BENCHMARK_SIZE (default 1.5b; see benchmarks/setup.py) changes the size, TEST_SECONDS the
# limit of the tests, CHECK_SECONDS that of everything: 9 minutes, so that a machine lent for 10 has one to unpack and copy. The
# tests and benchmarks that tell most come first; a benchmark that runs out of its share of the time reports what it has.
set -u
cd "$(dirname "$0")/.." || exit
output=${1:-gpu-check}
mkdir -p "$output"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1 NVTE_FRAMEWORK=pytorch
python=${PYTHON:-python3}
size=${BENCHMARK_SIZE:-1.5b}

part() { # part NAME SECONDS COMMAND…: run it, note seconds and exit code; interrupted, pytest still reports what it did
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  echo "== $name" | tee -a "$output/check.log"
  timeout -s INT -k 10 "$((limit > 0 ? limit : 1))" "$@" >>"$output/check.log" 2>&1 # 0 would be no limit
  code=$?
  sed "0,/^== $name\$/d" "$output/check.log" | tail -n 25
  echo "{\"part\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - started))}" >>"$output/parts.jsonl"
}

rm -f "$output/parts.jsonl" "$output/check.log"
part machine 50 "$python" -m tests.gpu.machine "$output/machine.json"
# Of whole runs only the one in bf16: each takes a minute or so.
part tests "${TEST_SECONDS:-210}" "$python" -m pytest tests/gpu/test_gpu_{policy,logprobs,train,attention,fp8,offload}.py -q \
  -k "not (test_gpu_train and (current or blockwise))" \
  -p no:cacheprovider --disable-warnings --junitxml "$output/tests.xml"
left=4
for name in breakdown layouts logprobs fp8; do
  part "$name" $(((${CHECK_SECONDS:-540} - SECONDS) / left)) "$python" -m "benchmarks.$name" --size "$size" --repeat 1 \
    --output "$output"
  left=$((left - 1))
done
"$python" -m tests.gpu.machine --summary "$output"
