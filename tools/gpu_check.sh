#!/usr/bin/env bash
# gpu_check.sh [OUTPUT]: a first check of a GPU in less than 10 minutes, most informative parts first.
#
#   part       seconds  question                                                              file in OUTPUT
#   machine         40  versions, GPU, available recipes and attention kernels                machine.json
#   smoke           75  does each kernel run: attention, layers, every FP8 recipe             smoke.json
#   exactness      120  bf16 and FP8 start at the exact loss; gradients; resuming             exactness.jsonl
#   breakdown       75  a step's time and MFU at 3B                                           breakdown.json
#   layouts         70  shared against unshared prompts, and the FLOP model's ratio           layouts.json
#   fp8             75  FP8 against bf16: speed, and the loss curves                          fp8.json
#   plan            55  peak memory against `mpo plan`                                        plan.json
#   tests           60  the other tests of tests/gpu, as many as there is time for            tests.jsonl
#
# Each part is a separate process with a time limit, and writes its file continuously: results stay if it, or a later part,
# crashes. parts/NAME.json has its exit code and seconds, check.log all output, summary.json a summary.
# The exit code is 1 if a part failed.
#
#   BENCHMARK_SIZE   size of the benchmarks (3b; see benchmarks/setup.py)
#   CHECK_SECONDS    all parts together (570); later parts get less, or nothing, where earlier ones took long
#   PARTS            only these, in this order: PARTS="smoke breakdown"
#   PYTHON           interpreter (python3)
set -u
cd "$(dirname "$0")/.." || exit
output=${1:-gpu-check}
mkdir -p "$output/parts"
output=$(cd "$output" && pwd)
rm -f "$output"/parts/*.json "$output"/*.jsonl "$output/check.log"
# As ranks set it for themselves (mpo_megatron/train/environment.py), on one GPU.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 NVTE_FRAMEWORK=pytorch
python=${PYTHON:-python3}
size=${BENCHMARK_SIZE:-3b}
deadline=$((SECONDS + ${CHECK_SECONDS:-570}))

part() { # part NAME SECONDS COMMAND…: run it within its limit and the remaining time, and record the outcome
  local name=$1 limit=$2 started=$SECONDS code=124
  shift 2
  ((limit = limit < deadline - SECONDS ? limit : deadline - SECONDS))
  echo "== $name" | tee -a "$output/check.log"
  if ((limit > 0)); then
    # Interrupted, benchmarks and pytest report what they have; 10 seconds later they are killed.
    timeout -s INT -k 10 "$limit" "$@" >"$output/parts/$name.log" 2>&1
    code=$?
  else
    echo "no time left" >"$output/parts/$name.log"
  fi
  tail -n 25 "$output/parts/$name.log"
  cat "$output/parts/$name.log" >>"$output/check.log"
  rm "$output/parts/$name.log"
  printf '{"part": "%s", "exit_code": %d, "seconds": %d, "limit": %d}\n' "$name" "$code" $((SECONDS - started)) "$limit" \
    >"$output/parts/$name.json"
}

tests() { # tests NAME SECONDS ARGUMENTS…: pytest, each outcome written at once
  local name=$1 limit=$2
  shift 2
  GPU_CHECK_TESTS="$output/$name.jsonl" part "$name" "$limit" "$python" -m pytest -p tests.gpu.results -p no:cacheprovider \
    --disable-warnings -q "$@"
}

benchmark() { # benchmark NAME SECONDS OPTIONS…
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m "benchmarks.$name" --size "$size" --repeat 1 --output "$output" "$@"
}

exact="exact_loss or log_probs or gradients or near_bf16 or resumes or layers_compute"
for each in ${PARTS:-machine smoke exactness breakdown layouts fp8 plan tests}; do
  case $each in
    machine) part machine 40 "$python" -m tests.gpu.machine "$output/machine.json" ;;
    smoke) part smoke 75 "$python" -m tests.gpu.smoke "$output/smoke.json" ;;
    exactness) tests exactness 120 tests/gpu/test_gpu_{policy,fp8,adapters,hybrid}.py -k "$exact" ;;
    breakdown) benchmark breakdown 75 ;;
    layouts) benchmark layouts 70 ;;
    fp8) benchmark fp8 75 --steps 8 ;;
    plan) benchmark plan 55 --ranks 1 ;;
    # Of the whole runs, only the one in bf16: each takes about a minute.
    tests) tests tests 60 tests/gpu/test_gpu_{attention,delta,hybrid,adapters,logprobs,train,rollout,offload,policy,fp8}.py \
      -k "not (test_gpu_train and (current or blockwise)) and not ($exact)" ;;
    *) echo "gpu_check.sh: PARTS has $each; there is no such part" >&2 && exit 2 ;;
  esac
done
"$python" -m tests.gpu.machine --summary "$output"
