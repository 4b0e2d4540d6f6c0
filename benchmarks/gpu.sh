#!/usr/bin/env bash
# One command on a machine with a GPU: build, then the parts that are named, or all.
#
#   benchmarks/gpu.sh [FOLDER [PART...]]
#
# FOLDER (default: benchmarks/results) takes the results. Parts: tests (pytest on cuda), kernels (benchmarks), train (a
# small model for three minutes, a compiled one, and sampling with and without CUDA graphs), sanitizer (compute-sanitizer
# on small shapes). A call ends within KLFLOW_LIMIT seconds (570): what comes too late is stopped or skipped, and is for
# another call that names its part.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
parts=${*:2}
limit=${KLFLOW_LIMIT:-570}
failed=0
for part in ${parts:=tests kernels train sanitizer}; do
  [[ $part =~ ^(tests|kernels|train|sanitizer)$ ]] || { echo "part: got $part, allowed is tests, kernels, train or sanitizer"; exit 2; }
done
wants() { [[ " $parts " == *" $1 "* ]]; }
step() {
  local name=$1 start=$SECONDS
  shift
  ((start < limit)) || { echo "skipped $name: no time left"; failed=1; return; }
  if timeout -k 5 $((limit - start)) "$@" >"$out/$name.log" 2>&1; then echo "ok      $name  $((SECONDS - start)) s"; else echo "FAILED  $name  $((SECONDS - start)) s (see $out/$name.log)"; failed=1; fi
}
python -c 'import torch; assert torch.cuda.is_available(), "this torch sees no CUDA device"' || exit 1
step build python -m pip install --no-build-isolation --no-deps --force-reinstall .
step info python -m klflow_ext info
if wants tests; then
  step tests python -m pytest python_tests/ops python_tests/path python_tests/sample -k cuda
fi
if wants kernels; then
  step benchmark python benchmarks/kernels.py --device cuda --seconds 0.3 --json "$out/cuda.json" --plot "$out/cuda.png"
  step embedding python benchmarks/embedding.py --rows 8192 --dtypes bfloat16,float32 --json "$out/cuda_embedding.json"
  step linear python benchmarks/linear_cross_entropy.py --dtypes bfloat16 --json "$out/cuda_linear_cross_entropy.json"
  step train python benchmarks/train_step.py --batch 64 --dtype bfloat16 --seconds 10 --json "$out/cuda_train_step.json"
  step memory python benchmarks/train_step.py --batch 64 --dtype bfloat16 --memory --json "$out/cuda_train_step.json" \
    --plot "$out/cuda_train_step.png"
  cat "$out"/{benchmark,embedding,linear,train,memory}.log 2>/dev/null
fi
if wants train; then
  if python -c 'import tokenizers, tyro, safetensors' 2>/dev/null; then
    runs=$(mktemp -d)
    trap 'rm -rf "$runs"' EXIT
    size=(--batch-size 256 --length 64 --device cuda --dtype bfloat16)
    step fit python -m klflow_ext train --out "$runs/fit" --seconds 180 "${size[@]}"
    step sampling python benchmarks/sampling.py "$runs/fit" --device cuda --json "$out/cuda_sampling.json"
    step fit_compiled python -m klflow_ext train --out "$runs/fit_compiled" --seconds 60 --compile "${size[@]}"
    for run in fit fit_compiled; do cp "$runs/$run/log.jsonl" "$out/$run.jsonl" 2>/dev/null; done
    cat "$out"/{fit,fit_compiled,sampling}.log 2>/dev/null
  else
    echo "skipped train: it needs pip install '.[train]'"
  fi
fi
if wants sanitizer; then
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
      step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 python -m pytest python_tests/ops \
        -k "cuda and (9-31 or 77-7 or 9-2500) and not opcheck and not compile" -x
    done
  else
    echo "skipped compute-sanitizer: not installed"
  fi
fi
exit $failed
